"""Copies of containers and snapshots, here and to another node; moves with and without another id."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.api import effects, make, name, node_directory, nothing_happens, scripted
from tests.helpers.cluster import BUSYBOX, Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def copy_of(source: str, **fields: Any) -> dict[str, Any]:
    return {"source": {"type": "copy", "source": source}, **fields}


def move_of(source: str, node: str, **fields: Any) -> dict[str, Any]:
    return {"source": {"type": "migration", "source": source}, "node": node, **fields}


def contents(fleet: Cluster, node: str) -> dict[str, str]:
    world = json.loads((node_directory(fleet, node) / "world.json").read_text())
    return {id: container["content"] for id, container in world["containers"].items()}


async def spoil(fleet: Cluster, container: str, node: str, content: str) -> None:
    """Change the container's files on its node, whose agent is restarted to see it."""
    await fleet.stop_agent(node)
    file = node_directory(fleet, node) / "world.json"
    world = json.loads(file.read_text())
    world["containers"][container]["content"] = content
    file.write_text(json.dumps(world))
    await fleet.start_agent(node)


@pytest.mark.parametrize("node", [None, "node1", "node2"])
async def test_a_copy(fleet: Cluster, node: str | None) -> None:
    config = {"user.a": "1", "user.b": "2"}
    original = await make(fleet, source=BUSYBOX, node="node1", hostname="first", config=config, description="d")
    copy = name()
    pinned = {"node": node} if node else {}
    operation = await fleet.done("POST", f"/1.0/vz/{copy}", copy_of(original, config={"user.b": "3"}, **pinned))
    assert operation["kind"] == "container.copy" and copy in str(operation["resources"])
    shown, first = await fleet.show(copy), await fleet.show(original)
    # Unasked it stays where its source is, with which it shares its blocks.
    assert shown["node"] == (node or "node1") and first["node"] == "node1"
    assert shown["config"] == {"user.a": "1", "user.b": "3"} and first["config"] == config
    assert (shown["hostname"], shown["description"], shown["image"]) == (copy, "d", first["image"])
    assert shown["status"]["status"] == first["status"]["status"] == "Stopped"
    assert contents(fleet, shown["node"])[copy] == contents(fleet, "node1")[original]


@pytest.mark.parametrize("node", ["node1", "node2"])
async def test_a_copy_of_a_running_container_leaves_it_running(fleet: Cluster, node: str) -> None:
    original, copy = await make(fleet, start=True, node="node1"), name()
    await fleet.done("POST", f"/1.0/vz/{copy}", copy_of(original, node=node, hostname="h", start=True))
    assert (await fleet.show(original))["status"]["status"] == "Running"
    shown = await fleet.show(copy)
    assert (shown["status"]["status"], shown["node"], shown["hostname"]) == ("Running", node, "h")
    assert "container.stop" not in effects(fleet, original)
    # What held the source still while its data travelled is gone.
    assert (await fleet.call("GET", f"/1.0/vz/{original}/snapshots"))["metadata"] == []
    assert effects(fleet, original).count("snapshot.create") == effects(fleet, original).count("snapshot.delete")


@pytest.mark.parametrize("node", ["node1", "node2"])
async def test_a_copy_of_a_snapshot_has_its_files_and_its_configuration(fleet: Cluster, node: str) -> None:
    original, copy = await make(fleet, node="node1", config={"user.a": "then"}), name()
    before = contents(fleet, "node1")[original]
    await fleet.done("POST", f"/1.0/vz/{original}/snapshots", {"name": "s"})
    await fleet.done("PUT", f"/1.0/vz/{original}", {"config": {"user.a": "now"}})
    await spoil(fleet, original, "node1", "spoilt")
    await fleet.done("POST", f"/1.0/vz/{copy}", copy_of(f"{original}/s", node=node))
    assert contents(fleet, node)[copy] == before != contents(fleet, "node1")[original]
    assert (await fleet.show(copy))["config"] == {"user.a": "then"}
    assert (await fleet.call("GET", f"/1.0/vz/{copy}/snapshots"))["metadata"] == []


async def test_a_copy_of_what_is_not_there_is_404(fleet: Cluster) -> None:
    original = await make(fleet)
    async with nothing_happens(fleet):
        for source in ("no-such", f"{original}/no-such"):
            answer = await fleet.refused("POST", f"/1.0/vz/{name()}", copy_of(source), 404)
            assert answer["metadata"]["field"] == "source.source"


async def test_a_failed_copy_stays_as_error_and_frees_its_source(fleet: Cluster) -> None:
    original, copy = await make(fleet, node="node1"), name()
    with scripted(fleet, "node1", faults=[{"command": "container.copy", "container": copy, "text": "full"}]):
        operation = await fleet.operation("POST", f"/1.0/vz/{copy}", copy_of(original))
    assert operation["status"] == "Failure" and operation["err"] == "full"
    assert (await fleet.show(copy))["status"]["status"] == "Error"
    await fleet.done("PUT", f"/1.0/vz/{original}/state", {"action": "start"})
    await fleet.done("POST", f"/1.0/vz/{copy}", copy_of(original))


async def test_much_data_travels_whole(fleet: Cluster) -> None:
    original, copy = await make(fleet, node="node1"), name()
    content = "0123456789abcdef" * 262_144
    await spoil(fleet, original, "node1", content)
    await fleet.done("POST", f"/1.0/vz/{copy}", copy_of(original, node="node2"))
    assert contents(fleet, "node2")[copy] == content


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("way", ["migration", "rename"])
@pytest.mark.parametrize("renamed", [False, True])
async def test_a_move(fleet: Cluster, way: str, renamed: bool, start: bool) -> None:
    fields = {"hostname": "h", "config": {"user.a": "1"}, "description": "d", "node": "node1", "start": start}
    old = await make(fleet, **fields)
    new = name() if renamed else old
    await fleet.done("POST", f"/1.0/vz/{old}/snapshots", {"name": "s"})
    before, content = await fleet.show(old), contents(fleet, "node1")[old]
    if way == "migration":
        operation = await fleet.done("POST", f"/1.0/vz/{new}", move_of(old, "node2"))
    else:
        body = {"migration": True, "node": "node2", **({"name": new} if renamed else {})}
        operation = await fleet.done("POST", f"/1.0/vz/{old}", body)
    assert f"/1.0/vz/{new}" in operation["resources"]["containers"] and operation["metadata"]["placement"]
    shown = await fleet.show(new)
    assert {**shown, "status": 0} == {**before, "id": new, "node": "node2", "status": 0}
    assert shown["status"]["status"] == ("Running" if start else "Stopped")
    assert contents(fleet, "node2")[new] == content and old not in contents(fleet, "node1")
    assert (await fleet.call("GET", f"/1.0/vz/{new}/snapshots"))["metadata"] == [f"/1.0/vz/{new}/snapshots/s"]
    if renamed:
        await fleet.refused("GET", f"/1.0/vz/{old}", None, 404)
    await fleet.done("PUT", f"/1.0/vz/{new}", {"restore": "s"})
    await fleet.done("DELETE", f"/1.0/vz/{new}?force=1")


async def test_a_migration_to_another_id_on_the_same_node_is_a_rename(fleet: Cluster) -> None:
    old, new = await make(fleet, node="node1"), name()
    await fleet.done("POST", f"/1.0/vz/{new}", {"source": {"type": "migration", "source": old}})
    assert (await fleet.show(new))["node"] == "node1"
    await fleet.refused("GET", f"/1.0/vz/{old}", None, 404)


async def test_moves_that_make_no_sense(fleet: Cluster) -> None:
    container, other = await make(fleet, node="node1"), await make(fleet, node="node2")
    url = f"/1.0/vz/{container}"
    async with nothing_happens(fleet):
        # To where it is; to nowhere; onto another's id; of nobody; from no id.
        await fleet.refused("POST", url, move_of(container, "node1"), 409)
        answer = await fleet.refused("POST", url, {"source": {"type": "migration", "source": container}}, 400)
        assert answer["metadata"]["field"] == "node"
        await fleet.refused("POST", url, move_of(container, "no-such"), 404)
        await fleet.refused("POST", f"/1.0/vz/{other}", move_of(container, "node2"), 409)
        await fleet.refused("POST", f"/1.0/vz/{name()}", move_of("no-such", "node2"), 404)
        answer = await fleet.refused("POST", "/1.0/vz", move_of(container, "node2"), 400)
        assert answer["metadata"]["field"] == "id"
        await fleet.refused("POST", url, move_of(container, "node2", start=True), 400)


async def test_a_move_to_a_node_that_cannot_hold_it_is_409(fleet: Cluster) -> None:
    big = {"limits.memory": "10GB"}
    one, other = await make(fleet, node="node1", config=big), await make(fleet, node="node2", config=big)
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{one}", move_of(one, "node2"), 409)
    assert answer["metadata"]["code"] == "no-placement"
    for container in (one, other):
        await fleet.done("DELETE", f"/1.0/vz/{container}")


@pytest.mark.parametrize("command", ["container.receive", "container.send", "container.start"])
async def test_a_move_that_fails_leaves_the_container_where_it_was(fleet: Cluster, command: str) -> None:
    container = await make(fleet, node="node1", start=True)
    target = "node1" if command == "container.send" else "node2"
    with scripted(fleet, target, faults=[{"command": command, "container": container, "text": "broken"}]):
        operation = await fleet.operation("POST", f"/1.0/vz/{container}", move_of(container, "node2"))
    assert operation["status"] == "Failure" and "broken" in operation["err"]
    shown = await fleet.show(container)
    assert (shown["node"], shown["status"]["status"]) == ("node1", "Running")
    assert container not in contents(fleet, "node2")
    await until(lambda: _clean(fleet), "node2 has nothing that is not managed")


async def _clean(fleet: Cluster) -> bool:
    return not (await fleet.call("GET", "/1.0/nodes/node2"))["metadata"]["unmanaged"]
