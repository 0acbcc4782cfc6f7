"""How containers travel, as clients see it: by which way, how far, how fast; refreshing copies; what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.cluster.test_api_copies import contents, copy_of, spoil
from tests.helpers.api import make, name, node_directory, nothing_happens, scripted
from tests.helpers.cluster import BUSYBOX, Cluster
from tests.helpers.listener import ended, listening

pytestmark = pytest.mark.asyncio(loop_scope="module")


def kept(fleet: Cluster, node: str) -> object:
    """What transfers keep on a node."""
    return json.loads((node_directory(fleet, node) / "world.json").read_text())["transfers"]


async def test_a_move_says_how_it_went(fleet: Cluster) -> None:
    container = await make(fleet, node="node1", start=True)
    operation = await fleet.done("POST", f"/1.0/vz/{container}", {"migration": True, "node": "node2"})
    told = operation["metadata"]
    assert told["via"] == "direct" and "via_reason" not in told and told["format"] in ("btrfs", "files")
    assert told["bytes"] == sum(one["bytes"] for one in told["rounds"]) > 0
    assert 0 <= told["downtime"]["seconds"] < 10 and 0 <= told["downtime"]["stopping_seconds"] < 10
    assert "progress" not in told and kept(fleet, "node1") == kept(fleet, "node2") == {}


async def test_progress_is_shown_and_told_without_a_number(fleet: Cluster) -> None:
    container = await make(fleet, node="node1", start=True)
    with scripted(fleet, "node1", delays={"container.stop": 2.5}):
        async with listening(fleet, "?type=operation") as listener:
            operation = await fleet.done("POST", f"/1.0/vz/{container}", {"migration": True, "node": "node2"})
            await listener.until(ended(operation["id"]))
    frames = [frame for frame in listener.frames if frame["metadata"]["id"] == operation["id"]]
    unnumbered = [frame for frame in frames if "sequence" not in frame]
    assert "stopping" in [frame["metadata"]["metadata"]["progress"]["stage"] for frame in unnumbered]
    assert all(frame["metadata"]["status"] == "Running" for frame in unnumbered)
    assert "sequence" in frames[-1] and frames[-1]["metadata"]["status"] == "Success"
    assert "progress" not in frames[-1]["metadata"]["metadata"]


# ---------------------------------------------------------------- refreshing


@pytest.mark.parametrize("node", ["node1", "node2"])
async def test_a_refresh(fleet: Cluster, node: str) -> None:
    original = await make(fleet, source=BUSYBOX, node="node1", config={"user.a": "1"})
    copy = name()
    await fleet.done("POST", f"/1.0/vz/{copy}", copy_of(original, node=node, hostname="mine", config={"user.a": "2"}))
    await fleet.done("POST", f"/1.0/vz/{copy}/snapshots", {"name": "s"})
    before = await fleet.show(copy)
    await spoil(fleet, original, "node1", "what is new")
    async with listening(fleet, f"?container={copy}") as listener:
        body = {"source": {"type": "copy", "source": original, "refresh": True}}
        operation = await fleet.done("POST", f"/1.0/vz/{copy}", body)
        await listener.until(ended(operation["id"]))
    assert operation["kind"] == "container.refresh" and listener.actions == ["container-updated"]
    assert contents(fleet, node)[copy] == "what is new" and kept(fleet, node) == {}
    shown = await fleet.show(copy)
    assert {**shown, "status": 0} == {**before, "status": 0}
    assert (await fleet.call("GET", f"/1.0/vz/{copy}/snapshots"))["metadata"] == [f"/1.0/vz/{copy}/snapshots/s"]


async def test_a_refresh_that_fails_leaves_the_old_files(fleet: Cluster) -> None:
    original, copy = await make(fleet, node="node1"), await make(fleet, node="node2")
    await spoil(fleet, original, "node1", "what is new")
    old = contents(fleet, "node2")[copy]
    body = {"source": {"type": "copy", "source": original, "refresh": True}}
    with scripted(fleet, "node2", faults=[{"command": "container.receive", "container": copy, "text": "broken"}]):
        operation = await fleet.operation("POST", f"/1.0/vz/{copy}", body)
    assert operation["status"] == "Failure" and "broken" in operation["err"]
    assert contents(fleet, "node2")[copy] == old
    assert (await fleet.show(copy))["status"]["status"] == "Stopped"
    await fleet.done("POST", f"/1.0/vz/{copy}", body)
    assert contents(fleet, "node2")[copy] == "what is new"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"config": {"user.a": "1"}}, "config"),
        ({"hostname": "h"}, "hostname"),
        ({"description": "d"}, "description"),
        ({"node": "node1"}, "node"),
        ({"start": True}, "start"),
        ({"bandwidth": "1kB"}, "bandwidth"),
        ({"timeout": 3}, "timeout"),
        ({"force": True}, "force"),
    ],
)
async def test_a_refreshed_container_keeps_its_own(fleet: Cluster, fields: dict[str, Any], field: str) -> None:
    original, copy = await make(fleet, node="node1"), await make(fleet, node="node2")
    body = {"source": {"type": "copy", "source": original, "refresh": True}, **fields}
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{copy}", body, 400)
    assert answer["metadata"]["field"] == field


async def test_refreshes_that_make_no_sense(fleet: Cluster) -> None:
    original, running = await make(fleet, node="node1"), await make(fleet, node="node1", start=True)

    def refresh(source: str) -> dict[str, Any]:
        return {"source": {"type": "copy", "source": source, "refresh": True}}

    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{original}", refresh(original), 400)
        assert answer["metadata"]["field"] == "source.source"
        await fleet.refused("POST", f"/1.0/vz/{name()}", refresh(original), 404)
        await fleet.refused("POST", f"/1.0/vz/{original}", refresh("no-such"), 404)
        await fleet.refused("POST", f"/1.0/vz/{original}", refresh(f"{running}/no-such"), 404)
        answer = await fleet.refused("POST", f"/1.0/vz/{running}", refresh(original), 409)
        assert "stop it first" in answer["error"]
        answer = await fleet.refused("POST", "/1.0/vz", refresh(original), 400)
        assert answer["metadata"]["field"] == "id"


# ---------------------------------------------------------------- how it travels


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"migration": True, "node": "node2", "bandwidth": "fast"}, "bandwidth"),
        ({"migration": True, "node": "node2", "bandwidth": "9999"}, "bandwidth"),
        ({"migration": True, "node": "node2", "timeout": -2}, "timeout"),
        ({"migration": True, "node": "node2", "timeout": 3601}, "timeout"),
        ({"migration": True, "node": "node2", "force": 1}, "force"),
        ({"name": "other", "bandwidth": "1MB"}, "bandwidth"),
        ({"hostname": "other", "force": True}, "force"),
        ({"hostname": "other", "timeout": 3}, "timeout"),
    ],
)
async def test_what_shapes_a_move_is_checked(fleet: Cluster, body: dict[str, Any], field: str) -> None:
    container = await make(fleet, node="node1")
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{container}", body, 400)
    assert answer["metadata"]["field"] == field


@pytest.mark.parametrize("source", [{"type": "none"}, BUSYBOX])
@pytest.mark.parametrize("fields", [{"bandwidth": "1MB"}, {"timeout": 3}, {"force": True}])
async def test_what_does_not_travel_has_no_bandwidth(
    fleet: Cluster, source: dict[str, Any], fields: dict[str, Any]
) -> None:
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{name()}", {"source": source, **fields}, 400)
    assert answer["metadata"]["field"] in fields


async def test_a_bandwidth_is_held(fleet: Cluster) -> None:
    container, copy = await make(fleet, node="node1"), name()
    await spoil(fleet, container, "node1", "x" * 3_000_000)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await fleet.done("POST", f"/1.0/vz/{copy}", copy_of(container, node="node2", bandwidth="1MB"))
    assert loop.time() - begun > 1, "3 MB at 1 MB/s"
    begun = loop.time()
    body = {"migration": True, "node": "node2", "bandwidth": "1GB", "timeout": 5, "force": True}
    await fleet.done("POST", f"/1.0/vz/{container}", body)
    assert loop.time() - begun < 5
