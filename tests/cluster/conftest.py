"""One fleet of two fake nodes for all tests of a module: a test makes containers under names of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.helpers.cluster import Cluster, cluster

PATIENCE = 8.0
"""Seconds without a heartbeat after which a node is Offline: a busy machine must not look like a dead node."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """A running controller with node1 and node2. Tests that use it have loop_scope "module"."""
    async with cluster(tmp_path_factory.mktemp("fleet"), nodes=2, heartbeat_timeout=PATIENCE) as made:
        yield made
