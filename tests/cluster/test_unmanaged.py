"""What is made, removed or left behind on a node without a row: shown at once, never touched, its id not given away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.config import load as load_agent
from agent.drivers.fake import FakeDriver
from common.clock import SystemClock
from tests.helpers.api import EMPTY, effects, make, name, nothing_happens, scripted
from tests.helpers.cluster import Cluster, cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def unmanaged(fleet: Cluster, node: str) -> list[str]:
    shown: list[str] = (await fleet.call("GET", f"/1.0/nodes/{node}"))["metadata"]["unmanaged"]
    return shown


@asynccontextmanager
async def node_by_hand(fleet: Cluster) -> AsyncIterator[tuple[str, FakeDriver]]:
    """A node whose driver the test holds."""
    node = name("node")
    await fleet.join(node)
    driver = FakeDriver(load_agent(fleet.directory / node / "agent.json"), SystemClock())
    await fleet.start_agent(node, driver)
    try:
        yield node, driver
    finally:
        await fleet.stop_agent(node)


async def test_a_container_made_by_hand_keeps_its_id(fleet: Cluster) -> None:
    async with node_by_hand(fleet) as (node, driver):
        container, other = name(), await make(fleet, node=node)
        driver.appear(container)
        await until(lambda: _is(fleet, node, [container]), "it is shown", 2)
        body = {"source": EMPTY, "node": node}
        async with nothing_happens(fleet):
            answer = await fleet.refused("POST", f"/1.0/vz/{container}", body, 409)
            assert "unmanaged" in answer["metadata"]["nodes"][node]
            await fleet.refused("POST", f"/1.0/vz/{other}", {"name": container}, 409)
        driver.vanish(container)
        await until(lambda: _is(fleet, node, []), "it is gone", 2)
        await fleet.done("POST", f"/1.0/vz/{container}", body)
        for made in (container, other):
            await fleet.done("DELETE", f"/1.0/vz/{made}")


async def _is(fleet: Cluster, node: str, containers: list[str]) -> bool:
    return await unmanaged(fleet, node) == containers


async def _fail_to_make(fleet: Cluster, node: str) -> str:
    """A creation that failed, and whose undo failed too: the node has the container, its row says Error."""
    container = name()
    faults = [
        {"command": "container.create", "container": container, "when": "after", "times": 100},
        {"command": "container.delete", "container": container, "times": 100},
    ]
    with scripted(fleet, node, faults=faults):
        operation = await fleet.operation("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": node})
    assert operation["status"] == "Failure"
    assert (await fleet.show(container))["status"]["status"] == "Error"
    return container


async def test_a_failed_creation_can_be_deleted_without_its_node(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=1, heartbeat_timeout=3.0) as fleet:
        whole, failed = await make(fleet), await _fail_to_make(fleet, "node1")
        await fleet.stop_agent("node1")
        await fleet.wait_for_node("node1", "Offline")
        async with nothing_happens(fleet):
            answer = await fleet.refused("DELETE", f"/1.0/vz/{failed}", None, 503)
            assert answer["metadata"]["field"] == "force" and "force=1" in answer["error"]
            assert "unmanaged" in answer["error"]
            # One that was whole may run there.
            answer = await fleet.refused("DELETE", f"/1.0/vz/{whole}?force=1", None, 503)
            assert "force" not in answer["error"]
        await fleet.done("DELETE", f"/1.0/vz/{failed}?force=1")
        await fleet.refused("GET", f"/1.0/vz/{failed}", None, 404)
        await fleet.start_agent("node1")
        await until(lambda: _is(fleet, "node1", [failed]), "what it left is shown")
        assert effects(fleet, failed) == ["container.create"]
        await fleet.refused("POST", f"/1.0/vz/{failed}", {"source": EMPTY}, 409)


async def test_a_failed_creation_on_a_node_within_reach_is_deleted_there(fleet: Cluster) -> None:
    failed = await _fail_to_make(fleet, "node2")
    await fleet.done("DELETE", f"/1.0/vz/{failed}?force=1")
    assert effects(fleet, failed) == ["container.create", "container.delete"]
    assert failed not in await unmanaged(fleet, "node2")
