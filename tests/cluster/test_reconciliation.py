"""After committed rows were lost: no writes until the nodes have told what they have, and no fence passed twice."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from controller.store import backup
from controller.store import events as event_rows
from tests.helpers.api import EMPTY, effects, make, name, scripted
from tests.helpers.cluster import Cluster, cluster, until


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, nodes=2) as made:
        yield made


async def mode(fleet: Cluster) -> dict[str, Any]:
    shown: dict[str, Any] = (await fleet.call("GET", "/1.0/reconciliation"))["metadata"]
    return shown


async def writes_are_accepted(fleet: Cluster) -> bool:
    return not (await mode(fleet))["active"]


async def writes_are_refused(fleet: Cluster) -> bool:
    return bool((await mode(fleet))["active"])


def make_backup(fleet: Cluster, file: Path) -> Path:
    backup.backup(fleet.settings.url, file)
    return file


async def restart_with(fleet: Cluster, file: Path) -> None:
    """Put a backup in place while the controller is down."""
    await fleet.stop_controller()
    backup.restore(fleet.settings.url, file)
    await fleet.start_controller()


async def epoch(fleet: Cluster) -> int:
    shown: int = (await fleet.call("GET", "/1.0"))["metadata"]["environment"]["epoch"]
    return shown


async def unmanaged(fleet: Cluster, node: str) -> str:
    return str((await fleet.call("GET", f"/1.0/nodes/{node}"))["metadata"]["unmanaged"])


async def test_a_backup_put_back_meets_what_the_nodes_have(fleet: Cluster, tmp_path: Path) -> None:
    kept, gone = await make(fleet, start=True, node="node1"), await make(fleet, node="node2")
    file = make_backup(fleet, tmp_path / "backup")
    made = [await make(fleet, start=True, node="node1") for _ in range(3)]
    await fleet.done("DELETE", f"/1.0/vz/{gone}")
    for _ in range(2):
        await fleet.stop_controller()
        await fleet.start_controller()
    await fleet.wait_for_node("node1", "Online")
    seen = await epoch(fleet)
    await fleet.stop_agent("node2")
    await restart_with(fleet, file)

    await fleet.wait_for_node("node1", "Online")
    shown = await mode(fleet)
    assert shown["active"] and shown["awaited"] == ["node2"] and "commits are missing" in shown["reason"]
    assert (await fleet.call("GET", "/1.0"))["metadata"]["reconciliation"] == shown
    body = {"source": EMPTY, "node": "node1"}
    refusal = await fleet.refused("POST", f"/1.0/vz/{name()}", body, 503)
    assert refusal["metadata"] == {"code": "unavailable"} and "node2" in refusal["error"]
    for method, path in (("DELETE", f"/1.0/vz/{kept}"), ("PUT", f"/1.0/vz/{kept}"), ("POST", "/1.0/nodes")):
        await fleet.refused(method, path, {}, 503)
    await fleet.call("POST", "/1.0/placement", {}, 200)
    await fleet.refused("POST", "/1.0/nodes/node1/state", {"action": "drain"}, 503)
    await fleet.call("POST", "/1.0/nodes/node1/state", {"action": "drain", "preview": True}, 200)
    assert (await fleet.show(kept))["status"]["status"] == "Running"
    for container in made:
        assert container in await unmanaged(fleet, "node1")
    assert (await fleet.show(gone))["status"]["status"] == "Error"

    # It is kept through a restart.
    await fleet.stop_controller()
    await fleet.start_controller()
    assert (await mode(fleet))["reason"] == shown["reason"]
    await fleet.start_agent("node2")
    await until(lambda: writes_are_accepted(fleet), "the last inventory ends it")
    assert "does not have this container" in (await fleet.show(gone))["status"]["reason"]
    assert await epoch(fleet) > seen, "no command of before may pass for one of now"
    # A new incarnation of an id that a node has seen under a higher generation.
    await fleet.done("DELETE", f"/1.0/vz/{kept}?force=1")
    await fleet.done("POST", f"/1.0/vz/{kept}", {"source": EMPTY, "node": "node1", "start": True})
    assert (await fleet.show(kept))["status"]["status"] == "Running"


async def test_what_was_moved_since_the_backup_runs_on_where_it_is(fleet: Cluster, tmp_path: Path) -> None:
    container = await make(fleet, start=True, node="node1")
    file = make_backup(fleet, tmp_path / "backup")
    await fleet.done("POST", f"/1.0/vz/{container}", {"migration": True, "node": "node2"})
    await restart_with(fleet, file)
    for node in ("node1", "node2"):
        await fleet.wait_for_node(node, "Online")
    await until(lambda: writes_are_accepted(fleet), "all nodes have told")
    assert container in await unmanaged(fleet, "node2")
    [found] = [
        each
        for each in (await fleet.call("GET", "/1.0/nodes/node2"))["metadata"]["unmanaged_containers"]
        if each["id"] == container
    ]
    assert found["status"] == "Running"
    assert (await fleet.show(container))["status"]["status"] == "Error"


async def test_what_was_under_way_is_ended_and_shown_as_the_nodes_have_it(fleet: Cluster, tmp_path: Path) -> None:
    container, other = name(), name()
    body = {"source": EMPTY, "node": "node1", "start": True}
    with scripted(fleet, "node1", delays={"container.start": 0.7}):
        started = await fleet.call("POST", f"/1.0/vz/{container}", body, 202)
        await until(lambda: effects(fleet, container, "node1") == ["container.create"], "it is created")
        with scripted(fleet, "node2", delays={"container.create": 0.7}):
            never = await fleet.call("POST", f"/1.0/vz/{other}", {**body, "node": "node2"}, 202)
            file = make_backup(fleet, tmp_path / "backup")
            for answer in (started, never):
                ended = await fleet.call("GET", f"{answer['operation']}/wait?timeout=20")
                assert ended["metadata"]["status"] == "Success"
    await fleet.done("DELETE", f"/1.0/vz/{other}?force=1")
    await restart_with(fleet, file)
    await until(lambda: writes_are_accepted(fleet), "both inventories end it")
    for answer in (started, never):
        ended = (await fleet.call("GET", answer["operation"]))["metadata"]
        assert ended["status"] == "Failure" and "cannot be known" in ended["err"], ended
    assert (await fleet.show(container))["status"]["status"] == "Running"
    assert effects(fleet, container, "node1") == ["container.create", "container.start"], "nothing is done again"
    assert "cannot be known" in (await fleet.show(other))["status"]["reason"]
    await fleet.done("DELETE", f"/1.0/vz/{other}?force=1")
    await fleet.done("DELETE", f"/1.0/vz/{container}?force=1")


async def test_an_administrator_ends_it(fleet: Cluster, tmp_path: Path) -> None:
    file = make_backup(fleet, tmp_path / "backup")
    await make(fleet, node="node1")
    await fleet.stop_agent("node2")
    await restart_with(fleet, file)
    await fleet.wait_for_node("node1", "Online")
    await fleet.refused("PUT", "/1.0/reconciliation", {"active": True}, 400)
    operator = {"Authorization": f"Bearer {await fleet.make_token('op', 'operator')}"}
    await fleet.refused("PUT", "/1.0/reconciliation", {"active": False}, 403, headers=operator)
    assert not await writes_are_accepted(fleet)
    await fleet.call("PUT", "/1.0/reconciliation", {"active": False})
    await make(fleet, node="node1")
    await fleet.stop_controller()
    await fleet.start_controller()
    assert await writes_are_accepted(fleet), "what was settled does not come back"


async def test_agents_remember_what_a_machine_put_back_as_a_whole_has_forgotten(fleet: Cluster, tmp_path: Path) -> None:
    """A snapshot of the machine takes the mark back with the database: only the nodes can know."""
    state = fleet.settings.state
    await fleet.stop_controller()
    shutil.copytree(state, tmp_path / "earlier")
    await fleet.start_controller()
    await fleet.wait_for_node("node1", "Online")
    container = await make(fleet, node="node1")
    # The agent hears of the last commit with a heartbeat.
    last, live = fleet.app.store.number, fleet.app.dispatcher._peers["node1"].link
    assert live.session is not None
    told = live.session.sequence
    await until(lambda: live.session is not None and live.session.sequence > told + 2, "two heartbeats")
    await fleet.stop_agent("node2")
    await fleet.stop_controller()
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "earlier", state)
    await fleet.start_controller()
    assert fleet.app.store.number < last
    await until(lambda: writes_are_refused(fleet), "a node says HELLO")
    shown = await mode(fleet)
    assert "older than what the nodes have seen" in shown["reason"] and "node1" in shown["reason"]
    await fleet.start_agent("node2")
    await until(lambda: writes_are_accepted(fleet), "all inventories are there")
    assert container in await unmanaged(fleet, "node1")


async def test_a_fleet_without_loss_is_not_held_up(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    await fleet.stop_agent("node2")
    await fleet.stop_controller()
    await fleet.start_controller()
    assert await writes_are_accepted(fleet)
    await fleet.wait_for_node("node1", "Online")
    await fleet.done("DELETE", f"/1.0/vz/{container}?force=1")


async def test_a_result_of_an_operation_that_no_row_knows_is_told(fleet: Cluster, tmp_path: Path) -> None:
    file = make_backup(fleet, tmp_path / "backup")
    container = name()
    with scripted(fleet, "node1", delays={"container.create": 0.5}):
        answer = await fleet.call("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": "node1"}, 202)
        link = fleet.app.dispatcher._peers["node1"]
        await until(lambda: any(call.accepted for call in link.calls.values()), "the node has begun")
        await fleet.stop_controller()
        await until(lambda: effects(fleet, container) == ["container.create"], "it is carried out")
    backup.restore(fleet.settings.url, file)
    await fleet.start_controller()
    await until(lambda: writes_are_accepted(fleet), "both inventories end it")
    await until(lambda: _told(fleet, answer["operation"]), "the operation is told of")
    assert container in await unmanaged(fleet, "node1")
    await fleet.call("GET", answer["operation"], code=404)


async def _told(fleet: Cluster, operation: str) -> bool:
    events = await fleet.app.store.read(lambda connection: event_rows.page(connection, 0, 1000))
    return any(event.action == "operation-unknown" and event.source == operation for event in events)
