"""Snapshots: list, create, show, restore, delete."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.api import TIME, effects, make, node_directory, nothing_happens, scripted
from tests.helpers.cluster import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def snapshots(fleet: Cluster, container: str, query: str = "") -> list[Any]:
    found: list[Any] = (await fleet.call("GET", f"/1.0/vz/{container}/snapshots{query}"))["metadata"]
    return found


async def test_create_list_show_delete(fleet: Cluster) -> None:
    container = await make(fleet, config={"user.a": "1"})
    url = f"/1.0/vz/{container}/snapshots"
    assert await snapshots(fleet, container) == []
    operation = await fleet.done("POST", url, {"name": "before"})
    assert operation["resources"] == {"containers": [f"/1.0/vz/{container}"], "snapshots": [f"{url}/before"]}
    await fleet.done("POST", url, {"name": "after"})
    assert await snapshots(fleet, container) == [f"{url}/before", f"{url}/after"]
    shown = (await fleet.call("GET", f"{url}/before"))["metadata"]
    assert shown.keys() == {"name", "container", "created_at", "config"}
    assert (shown["name"], shown["container"], shown["config"]) == ("before", container, {"user.a": "1"})
    assert TIME.fullmatch(shown["created_at"])
    assert await snapshots(fleet, container, "?recursion=1") == [
        shown,
        (await fleet.call("GET", f"{url}/after"))["metadata"],
    ]
    await fleet.done("DELETE", f"{url}/before")
    assert await snapshots(fleet, container) == [f"{url}/after"]
    await fleet.refused("GET", f"{url}/before", None, 404)
    await fleet.refused("DELETE", f"{url}/before", None, 404)


async def test_without_a_name_they_are_numbered(fleet: Cluster) -> None:
    container = await make(fleet)
    for _ in range(2):
        await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {})
    await fleet.done("DELETE", f"/1.0/vz/{container}/snapshots/snap0")
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {})
    names = sorted(url.rpartition("/")[2] for url in await snapshots(fleet, container))
    assert names == ["snap0", "snap1"]


async def test_a_taken_name_is_409(fleet: Cluster) -> None:
    container = await make(fleet)
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"})
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"}, 409)
    assert answer["metadata"] == {"code": "conflict", "field": "name"}


async def test_a_failed_snapshot_is_not_listed(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    fault = {"command": "snapshot.create", "container": container, "when": "after"}
    with scripted(fleet, "node1", faults=[fault]):
        operation = await fleet.operation("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"})
    assert operation["status"] == "Failure" and await snapshots(fleet, container) == []
    assert effects(fleet, container) == ["container.create", "snapshot.create", "snapshot.delete"]


async def with_content(fleet: Cluster, container: str, content: str) -> None:
    """Change the container's files on its node, whose agent is restarted to see it."""
    node = (await fleet.show(container))["node"]
    await fleet.stop_agent(node)
    file = node_directory(fleet, node) / "world.json"
    world = json.loads(file.read_text())
    world["containers"][container]["content"] = content
    file.write_text(json.dumps(world))
    await fleet.start_agent(node)


def content(fleet: Cluster, container: str, node: str) -> str:
    world = json.loads((node_directory(fleet, node) / "world.json").read_text())
    return str(world["containers"][container]["content"])


@pytest.mark.parametrize("start", [False, True])
async def test_restore_puts_the_files_back(fleet: Cluster, start: bool) -> None:
    container = await make(fleet, node="node1", start=start)
    before = content(fleet, container, "node1")
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "good"})
    await with_content(fleet, container, "spoilt")
    status = (await fleet.show(container))["status"]["status"]
    await fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "good"})
    assert content(fleet, container, "node1") == before
    # It runs again if it ran before, and the snapshot stays. LXD's clients name it with the container.
    assert (await fleet.show(container))["status"]["status"] == status == ("Running" if start else "Stopped")
    assert await snapshots(fleet, container) == [f"/1.0/vz/{container}/snapshots/good"]
    await fleet.done("PUT", f"/1.0/vz/{container}", {"restore": f"{container}/good"})


async def test_they_go_with_their_container(fleet: Cluster) -> None:
    container = await make(fleet)
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"})
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    await fleet.done("POST", f"/1.0/vz/{container}", {"source": {"type": "none"}})
    assert await snapshots(fleet, container) == []
