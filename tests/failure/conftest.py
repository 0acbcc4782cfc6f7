"""The tests of faults: the report that each writes, their time, their marks."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.failure.report import Report, as_property

HERE = Path(__file__).parent
SHORT_TIMEOUT, LONG_TIMEOUT = 240, 2 * 3600
written = pytest.StashKey[Report]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every test here is one of faults, and may take longer than others."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.failure)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(LONG_TIMEOUT if config.getoption("--long") else SHORT_TIMEOUT))


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """The report of this test; its name is the argument of `pytest.mark.failure`, else the test's."""
    names = [mark.args[0] for mark in request.node.iter_markers("failure") if mark.args]
    made = Report(names[0] if names else request.node.name)
    request.node.stash[written] = made
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Keep the report, however the test ends; fail when it holds a violation."""
    try:
        yield
    finally:
        made = item.stash.get(written, None)
        if made is not None:
            item.user_properties.append(as_property(made))
    if made is not None:
        made.raise_violations()
