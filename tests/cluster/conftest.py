"""One fleet of two fake nodes for all tests of a module: a test makes containers under names of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.helpers.cluster import Cluster, cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """A running controller with node1 and node2. Tests that use it have loop_scope "module"."""
    async with cluster(tmp_path_factory.mktemp("fleet"), nodes=2) as made:
        yield made
