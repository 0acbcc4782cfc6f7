"""Hand-made changes on a host: shown as drift with the difference, told as events, never undone, resolved by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agent.config import load as load_agent
from agent.drivers.fake import FakeDriver
from common.clock import SystemClock
from tests.helpers.api import effects, make, name, nothing_happens
from tests.helpers.cluster import Cluster, cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
SETTLE = 10.0
"""Seconds after healing in which what the API says becomes what the nodes have (I5)."""
LIMIT = {"config": {"limits.memory": "64MiB"}}
STOPPED = {"field": "status", "expected": "Running", "found": "Stopped"}
GONE = {"field": "existence", "expected": "present", "found": "absent"}
ALTERED = {"field": "config.limits.memory", "expected": "64MiB", "found": "32MiB"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path_factory.mktemp("fleet"), nodes=0) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def host(fleet: Cluster) -> AsyncIterator[tuple[str, FakeDriver]]:
    """A node, and the hands on its host."""
    node = name("node")
    await fleet.join(node)
    driver = driver_of(fleet, node)
    await fleet.start_agent(node, driver)
    yield node, driver
    await fleet.stop_agent(node)


def driver_of(fleet: Cluster, node: str) -> FakeDriver:
    return FakeDriver(load_agent(fleet.directory / node / "agent.json"), SystemClock())


async def drift(fleet: Cluster, container: str) -> list[dict[str, Any]]:
    return list((await fleet.show(container))["drift"])


async def shown(fleet: Cluster, container: str, *expected: dict[str, Any]) -> None:
    """Wait until the container's drift is just this, everywhere."""
    found: list[Any] = []

    async def as_expected() -> bool:
        found[:] = await drift(fleet, container)
        return found == list(expected)

    await until(as_expected, f"drift {expected}", SETTLE)
    node = (await fleet.show(container))["node"]
    drifted = (await fleet.call("GET", f"/1.0/nodes/{node}"))["metadata"]["drifted"]
    listed = (await fleet.call("GET", f"/1.0/vz?drift=1&node={node}"))["metadata"]
    fitting = (await fleet.call("GET", f"/1.0/vz?drift=0&node={node}"))["metadata"]
    assert (container in drifted) == (f"/1.0/vz/{container}" in listed) == bool(expected)
    assert (f"/1.0/vz/{container}" in fitting) != bool(expected)


async def told(fleet: Cluster, container: str) -> list[str]:
    """The actions of the events of a container, in order."""
    page = await fleet.app.events.page(0)
    while page and (more := await fleet.app.events.page(page[-1].sequence)):
        page += more
    return [event.action for event in page if event.container == container]


async def test_a_container_stopped_by_hand(fleet: Cluster, host: tuple[str, FakeDriver]) -> None:
    node, driver = host
    container = await make(fleet, start=True, node=node)
    await shown(fleet, container)
    driver.die(container)
    await shown(fleet, container, STOPPED)
    assert effects(fleet, container) == ["container.create", "container.start"], "nothing is undone by itself"
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "start"})
    await shown(fleet, container)
    await until(lambda: _ends_with(fleet, container, "container-drift-cleared"), "it is told")
    assert [action for action in await told(fleet, container) if "drift" in action] == [
        "container-drifted",
        "container-drift-cleared",
    ]


async def _ends_with(fleet: Cluster, container: str, action: str) -> bool:
    return (await told(fleet, container))[-1] == action


async def test_what_is_found_can_be_accepted(fleet: Cluster, host: tuple[str, FakeDriver]) -> None:
    node, driver = host
    container = await make(fleet, start=True, node=node)
    driver.die(container)
    await shown(fleet, container, STOPPED)
    url = f"/1.0/vz/{container}/state"
    await fleet.done("PUT", url, {"action": "stop"})
    await shown(fleet, container)
    await fleet.refused("PUT", url, {"action": "stop"}, 400)


async def test_a_limit_altered_by_hand(fleet: Cluster, host: tuple[str, FakeDriver]) -> None:
    node, driver = host
    container = await make(fleet, start=True, node=node, **LIMIT)
    driver.alter(container, "limits.memory", "32MiB")
    await shown(fleet, container, ALTERED)
    view = (await fleet.call("GET", f"/1.0/vz?recursion=1&node={node}"))["metadata"]
    assert [each["drift"] for each in view] == [[ALTERED]] and view[0]["config"] == LIMIT["config"]
    await fleet.done("PUT", f"/1.0/vz/{container}", LIMIT)
    await shown(fleet, container)


async def test_a_container_removed_by_hand_can_be_deleted(fleet: Cluster, host: tuple[str, FakeDriver]) -> None:
    node, driver = host
    container = await make(fleet, node=node)
    driver.vanish(container)
    await shown(fleet, container, GONE)
    assert (await fleet.show(container))["status"]["status"] == "Error"
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    await fleet.refused("GET", f"/1.0/vz/{container}", None, 404)


async def test_one_in_its_place_stays_when_it_is_deleted(fleet: Cluster, host: tuple[str, FakeDriver]) -> None:
    node, driver = host
    container = await make(fleet, node=node)
    driver.vanish(container)
    driver.appear(container)
    await shown(fleet, container, GONE)
    answer = await fleet.refused("POST", f"/1.0/vz/{container}", {"source": {"type": "adopt"}, "node": node}, 409)
    assert answer["metadata"]["field"] == "id"
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    await fleet.done("POST", f"/1.0/vz/{container}", {"source": {"type": "adopt"}, "node": node})
    await shown(fleet, container)


async def test_what_changed_while_the_node_was_away_is_shown_when_it_is_back(fleet: Cluster) -> None:
    node = name("node")
    await fleet.join(node)
    await fleet.start_agent(node, driver_of(fleet, node))
    stopped, removed, altered = [await make(fleet, start=True, node=node, **LIMIT) for _ in range(3)]
    await fleet.stop_agent(node)
    await fleet.wait_for_node(node, "Offline")
    for container in (stopped, removed, altered):
        assert await drift(fleet, container) == [], "nothing is known of a node out of reach"
    driver = driver_of(fleet, node)
    await driver.open(lambda report, gone: None)
    driver.die(stopped)
    driver.vanish(removed)
    driver.alter(altered, "limits.memory", "32MiB")
    await driver.close()
    await fleet.start_agent(node, driver_of(fleet, node))
    await shown(fleet, stopped, STOPPED)
    await shown(fleet, removed, GONE)
    await shown(fleet, altered, ALTERED)
    await fleet.stop_agent(node)


async def test_drift_is_known_again_after_a_restart_of_the_controller(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=0) as fleet:
        await fleet.join("node1")
        driver = driver_of(fleet, "node1")
        await fleet.start_agent("node1", driver)
        container = await make(fleet, start=True, node="node1")
        driver.die(container)
        await shown(fleet, container, STOPPED)
        await fleet.stop_controller()
        await fleet.start_controller()
        await fleet.wait_for_node("node1", "Online")
        await shown(fleet, container, STOPPED)


async def test_a_container_that_starts_with_its_host_has_not_drifted(
    fleet: Cluster, host: tuple[str, FakeDriver]
) -> None:
    node, driver = host
    container = await make(fleet, node=node, config={"boot.autostart": "true"})
    other = await make(fleet, node=node)
    for each in (container, other):
        driver.wake(each)
    await shown(fleet, other, {"field": "status", "expected": "Stopped", "found": "Running"})
    await shown(fleet, container)


async def test_an_unknown_filter_is_refused(fleet: Cluster) -> None:
    async with nothing_happens(fleet):
        await fleet.refused("GET", "/1.0/vz?drift=perhaps", None, 400)
