"""The life of a node: drained and restored, fenced and back, removed. No container ever runs on two of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agent.app import boot_record
from agent.config import load as load_agent
from common.states import NodeStatus
from controller.services.fencing import Fencing
from tests.helpers.api import EMPTY, effects, make, name, node_directory, nothing_happens, scripted
from tests.helpers.cluster import BUSYBOX, Cluster, cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
OFF = {"action": "fence", "i_confirm_node_is_off": True}


@pytest_asyncio.fixture(loop_scope="module")
async def two(tmp_path: Path) -> AsyncIterator[Cluster]:
    """node1 and node2, of this test alone; one that is silent is Offline after three seconds."""
    async with cluster(tmp_path, nodes=2, heartbeat_timeout=3.0) as fleet:
        yield fleet


async def node(fleet: Cluster, which: str) -> dict[str, Any]:
    shown: dict[str, Any] = (await fleet.call("GET", f"/1.0/nodes/{which}"))["metadata"]
    return shown


async def status(fleet: Cluster, container: str) -> tuple[str, str]:
    """Where it is, and how."""
    shown = await fleet.show(container)
    return shown["node"], shown["status"]["status"]


def hosts(fleet: Cluster, container: str) -> list[str]:
    """The nodes on which it really runs, whether their agents do or not."""
    found = []
    for directory in sorted(fleet.directory.glob("node*")):
        world = json.loads((directory / "fake" / "world.json").read_text(encoding="utf-8"))
        if world["containers"].get(container, {}).get("status") in (103, 110):
            found.append(directory.name)
    return found


async def lose(fleet: Cluster, which: str) -> None:
    """The node cannot be reached; what runs there goes on."""
    await fleet.stop_agent(which)
    await fleet.wait_for_node(which, "Offline")


async def fence(fleet: Cluster, which: str) -> dict[str, Any]:
    await lose(fleet, which)
    answer: dict[str, Any] = (await fleet.call("POST", f"/1.0/nodes/{which}/state", OFF, 200))["metadata"]
    return answer


async def drain(fleet: Cluster, which: str, **options: Any) -> dict[str, Any]:
    return await fleet.operation("POST", f"/1.0/nodes/{which}/state", {"action": "drain", **options})


async def restore(fleet: Cluster, which: str, **options: Any) -> dict[str, Any]:
    return await fleet.done("POST", f"/1.0/nodes/{which}/state", {"action": "restore", **options})


def named(entries: list[dict[str, Any]]) -> set[str]:
    return {entry["container"] for entry in entries}


# ---------------------------------------------------------------- drain


async def test_a_drain_is_previewed_then_moves_everything_and_is_taken_back(two: Cluster) -> None:
    running = await make(two, start=True, node="node1")
    stopped = await make(two, node="node1")
    async with nothing_happens(two):
        body = {"action": "drain", "preview": True}
        preview = (await two.call("POST", "/1.0/nodes/node1/state", body, 200))["metadata"]
    assert {(task["container"], task["action"], task["node"], task["running"]) for task in preview} == {
        (running, "move", "node2", True),
        (stopped, "move", "node2", False),
    }
    assert all(task["reason"] for task in preview)

    ended = await drain(two, "node1")
    assert ended["status"] == "Success" and ended["resources"] == {"nodes": ["/1.0/nodes/node1"]}, ended
    assert named(ended["metadata"]["done"]) == {running, stopped} and not ended["metadata"]["failed"]
    assert await status(two, running) == ("node2", "Running") and await status(two, stopped) == ("node2", "Stopped")
    for entry in ended["metadata"]["done"]:
        child = (await two.call("GET", entry["operation"]))["metadata"]
        assert (child["kind"], child["status"], entry["node"]) == ("container.move", "Success", "node2")
        assert child["requestor"]["username"] == "admin"

    shown = await node(two, "node1")
    assert (shown["status"], shown["mode"], shown["containers"]) == ("Draining", "draining", 0)
    async with nothing_happens(two):
        answer = await two.refused("POST", f"/1.0/vz/{name()}", {"source": EMPTY, "node": "node1"}, 409)
        assert "Draining" in answer["error"]
        await two.refused("POST", f"/1.0/vz/{running}", {"migration": True, "node": "node1"}, 409)
    assert (await two.done("POST", f"/1.0/vz/{name()}", {"source": EMPTY}))["location"] == "node2"

    back = (await two.call("POST", "/1.0/nodes/node1/state", {"action": "restore", "preview": True}, 200))["metadata"]
    assert {(task["container"], task["action"], task["node"]) for task in back} == {
        (running, "move", "node1"),
        (stopped, "move", "node1"),
    }
    ended = await restore(two, "node1")
    assert named(ended["metadata"]["done"]) == {running, stopped}
    assert await status(two, running) == ("node1", "Running") and await status(two, stopped) == ("node1", "Stopped")
    assert (await node(two, "node1"))["status"] == "Online"
    await two.refused("POST", "/1.0/nodes/node1/state", {"action": "restore"}, 409)


async def test_what_has_no_place_elsewhere_is_left_and_named_and_a_second_drain_goes_on(two: Cluster) -> None:
    large = await make(two, start=True, node="node1", config={"limits.memory": "10GB"})
    small = await make(two, node="node1")
    other = await make(two, node="node2", config={"limits.memory": "10GB"})
    preview = (await two.call("POST", "/1.0/nodes/node1/state", {"action": "evacuate", "preview": True}))["metadata"]
    assert {task["container"]: task["action"] for task in preview} == {large: "leave", small: "move"}
    ended = await drain(two, "node1", mode="migrate")
    assert ended["status"] == "Failure" and large in ended["err"] and "memory" in ended["err"], ended
    assert named(ended["metadata"]["left"]) == {large} and named(ended["metadata"]["done"]) == {small}
    assert await status(two, large) == ("node1", "Running")
    shown = await node(two, "node1")
    assert shown["status"] == "Draining" and "1 are on it" in shown["message"]
    await two.done("DELETE", f"/1.0/vz/{other}")
    ended = await drain(two, "node1")
    assert ended["status"] == "Success" and named(ended["metadata"]["done"]) == {large}
    # What both of them moved comes back, or nothing, as one likes.
    assert named(
        (await two.call("POST", "/1.0/nodes/node1/state", {"action": "restore", "preview": True}))["metadata"]
    ) == {large, small}
    ended = await restore(two, "node1", mode="skip")
    assert ended["metadata"]["done"] == [] and await status(two, large) == ("node2", "Running")


async def test_a_drain_can_stop_instead_and_a_restore_starts_what_it_stopped(two: Cluster) -> None:
    running, stopped = await make(two, start=True, node="node1"), await make(two, node="node1")
    stubborn = await make(two, start=True, node="node1")
    with scripted(two, "node1", stubborn=[stubborn]):
        ended = await drain(two, "node1", mode="stop", timeout=1)
    assert ended["status"] == "Failure" and stubborn in ended["err"] and running not in ended["err"]
    assert named(ended["metadata"]["done"]) == {running} and named(ended["metadata"]["failed"]) == {stubborn}
    assert effects(two, running) == ["container.create", "container.start", "container.stop"]
    ended = await drain(two, "node1", mode="stop", force=True)
    assert ended["status"] == "Success" and named(ended["metadata"]["done"]) == {stubborn}
    await restore(two, "node1")
    assert [await status(two, one) for one in (running, stopped, stubborn)] == [
        ("node1", "Running"),
        ("node1", "Stopped"),
        ("node1", "Running"),
    ]


async def test_a_container_that_cannot_be_moved_is_named_and_the_rest_goes_on(two: Cluster) -> None:
    containers = [await make(two, start=True, node="node1") for _ in range(3)]
    bad = sorted(containers)[1]
    faults = [{"command": "container.stop", "container": bad, "times": 9}]
    with scripted(two, "node1", faults=faults):
        ended = await drain(two, "node1")
    assert ended["status"] == "Failure" and "a scripted fault" in ended["err"]
    assert named(ended["metadata"]["done"]) == set(containers) - {bad}
    [failed] = ended["metadata"]["failed"]
    assert failed["container"] == bad and "a scripted fault" in failed["reason"] and failed["operation"]
    assert await status(two, bad) == ("node1", "Running")


async def test_a_drain_waits_for_a_container_that_is_busy(two: Cluster) -> None:
    container = await make(two, node="node1")
    with scripted(two, "node1", delays={"container.start": 1.0}):
        answer = await two.call("PUT", f"/1.0/vz/{container}/state", {"action": "start"}, 202)
        ended = await drain(two, "node1")
    assert ended["status"] == "Success", ended
    assert (await two.call("GET", answer["operation"]))["metadata"]["status"] == "Success"
    assert await status(two, container) == ("node2", "Running") and hosts(two, container) == ["node2"]


async def test_what_another_operation_stops_meanwhile_is_no_failure_of_the_drain(two: Cluster) -> None:
    container = await make(two, start=True, node="node1")
    with scripted(two, "node1", delays={"container.stop": 1.0}):
        answer = await two.call("PUT", f"/1.0/vz/{container}/state", {"action": "stop", "force": True}, 202)
        ended = await drain(two, "node1", mode="stop")
    assert ended["status"] == "Success", ended
    assert ended["metadata"]["done"] == [] and ended["metadata"]["left"] == []
    assert (await two.call("GET", answer["operation"]))["metadata"]["status"] == "Success"
    assert await status(two, container) == ("node1", "Stopped")


async def test_a_drain_goes_on_after_a_restart_of_the_controller(two: Cluster) -> None:
    containers = [await make(two, start=True, node="node1") for _ in range(3)]
    with scripted(two, "node1", delays={"container.stop": 0.7}):
        answer = await two.call("POST", "/1.0/nodes/node1/state", {"action": "drain"}, 202)
        await two.refused("POST", "/1.0/nodes/node1/state", {"action": "restore"}, 409)
        await until(lambda: hosts(two, sorted(containers)[0]) == ["node2"], "the first one is moved")
        await two.stop_controller()
        await two.start_controller()
        assert (await node(two, "node1"))["mode"] == "draining"
        ended = (await two.call("GET", f"{answer['operation']}/wait?timeout=30"))["metadata"]
    assert ended["status"] == "Success", ended
    assert named(ended["metadata"]["done"]) == set(containers)
    for container in containers:
        assert await status(two, container) == ("node2", "Running") and hosts(two, container) == ["node2"]
        assert effects(two, container, "node1").count("container.stop") == 1


async def test_a_cancelled_drain_begins_no_other_container(two: Cluster) -> None:
    containers = sorted([await make(two, start=True, node="node1") for _ in range(2)])
    with scripted(two, "node1", delays={"container.stop": 1.0}):
        answer = await two.call("POST", "/1.0/nodes/node1/state", {"action": "drain"}, 202)
        await until(lambda: two.app.fleet.containers[containers[0]].record.operation, "the first one is under way")
        await two.call("DELETE", answer["operation"])
        ended = (await two.call("GET", f"{answer['operation']}/wait?timeout=20"))["metadata"]
        assert ended["status"] == "Cancelled", ended
        await until(lambda: hosts(two, containers[0]) == ["node2"], "the one under way is moved")
    assert await status(two, containers[1]) == ("node1", "Running")
    assert (await node(two, "node1"))["status"] == "Draining"
    await restore(two, "node1")


async def test_bodies_and_rights(fleet: Cluster) -> None:
    path = "/1.0/nodes/node1/state"
    async with nothing_happens(fleet):
        for body, field in (
            ({}, "action"),
            ({"action": "reboot"}, "action"),
            ({"action": "drain", "mode": "skip"}, "mode"),
            ({"action": "restore", "mode": "stop"}, "mode"),
            ({"action": "fence", "mode": "move"}, "mode"),
            ({"action": "drain", "timeout": -2}, "timeout"),
        ):
            assert (await fleet.refused("POST", path, body, 400))["metadata"]["field"] == field
        await fleet.refused("POST", "/1.0/nodes/none/state", {"action": "drain"}, 404)
        await fleet.refused("POST", "/1.0/nodes/none/state", OFF, 404)
        operator = {"headers": {"Authorization": f"Bearer {await fleet.make_token(name(), 'operator')}"}}
        await fleet.refused("POST", path, {"action": "drain"}, 403, **operator)
        await fleet.refused("POST", f"/1.0/vz/{name()}", {"recover": True}, 403, **operator)


# ---------------------------------------------------------------- fence


async def test_a_fence_needs_a_host_that_does_not_answer_and_an_operators_word(two: Cluster) -> None:
    container = await make(two, start=True, node="node2")
    async with nothing_happens(two):
        answer = await two.refused("POST", "/1.0/nodes/node2/state", OFF, 409)
        assert "answers" in answer["error"]
        answer = await two.refused("POST", f"/1.0/vz/{container}", {"recover": True}, 409)
        assert "fence" in answer["error"]
    await lose(two, "node2")
    async with nothing_happens(two):
        for body in ({"action": "fence"}, {"action": "fence", "confirm": "node1"}):
            assert (await two.refused("POST", "/1.0/nodes/node2/state", body, 400))["metadata"]["field"] == "confirm"
        # Out of reach is not off: nothing of it starts elsewhere.
        await two.refused("POST", f"/1.0/vz/{container}", {"recover": True}, 409)
        preview = await two.call("POST", "/1.0/nodes/node2/state", {"action": "fence", "preview": True}, 200)
        assert preview["metadata"]["containers"] == [container]
    assert (await node(two, "node2"))["mode"] == "active"
    fenced = await two.call("POST", "/1.0/nodes/node2/state", {"action": "fence", "confirm": "node2"}, 200)
    assert fenced["metadata"]["containers"] == [container] and "recover" in fenced["metadata"]["next"]
    shown = await node(two, "node2")
    assert (shown["status"], shown["mode"], shown["fenced_by"]) == ("Offline", "fenced", "admin")
    assert shown["fenced_at"] in shown["message"] and "fenced by admin" in shown["message"]
    reason = (await two.show(container))["status"]["reason"]
    assert "fenced by admin" in reason
    await two.refused("POST", f"/1.0/vz/{name()}", {"source": EMPTY, "node": "node2"}, 409)
    await two.refused("POST", "/1.0/nodes/node2/state", {"action": "restore"}, 409)
    await two.refused("POST", "/1.0/nodes/node2/state", {"action": "drain"}, 409)


async def test_what_is_under_way_on_a_fenced_node_ends_and_is_free_again(two: Cluster) -> None:
    container, other = await make(two, start=True, node="node2"), await make(two, start=True, node="node1")
    with scripted(two, "node2", delays={"container.stop": 60.0}):
        stop = await two.call("PUT", f"/1.0/vz/{container}/state", {"action": "stop", "timeout": 600}, 202)
        with scripted(two, "node2", delays={"container.stop": 60.0, "container.start": 60.0}):
            move = await two.call("POST", f"/1.0/vz/{other}", {"migration": True, "node": "node2"}, 202)
            await until(lambda: "container.stop" in effects(two, other, "node1"), "it is stopped for its move")
            answer = await fence(two, "node2")
    assert set(answer["operations"]) == {stop["operation"], move["operation"]}
    for url in answer["operations"]:
        ended = (await two.call("GET", f"{url}/wait?timeout=10"))["metadata"]
        assert ended["status"] == "Failure" and "fenced by admin" in ended["err"], ended
    # What the move had stopped runs again where it is.
    await until(lambda: _shows(two, other, ("node1", "Running")), "it runs where it was")
    ended = await two.done("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY})
    assert ended["location"] == "node1"


async def _shows(fleet: Cluster, container: str, expected: tuple[str, str]) -> bool:
    return await status(fleet, container) == expected


async def test_recovered_elsewhere_and_stopped_on_the_host_that_comes_back(two: Cluster) -> None:
    config = {"limits.memory": "256MB", "user.a": "b"}
    container = await make(two, start=True, node="node2", source=BUSYBOX, config=config, hostname="web")
    await two.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "s"})
    stays = await make(two, start=True, node="node2")
    before = await two.show(container)
    await fence(two, "node2")
    ended = await two.done("POST", f"/1.0/vz/{container}", {"recover": True})
    assert ended["location"] == "node1" and ended["metadata"]["recovered_from"] == "node2"
    assert "files" in ended["metadata"]["warning"]
    after = await two.show(container)
    assert {key: after[key] for key in ("hostname", "config", "image", "created_at")} == {
        key: before[key] for key in ("hostname", "config", "image", "created_at")
    }
    # It ran when it was last seen; its snapshots are on the host that is off.
    assert (after["node"], after["status"]["status"]) == ("node1", "Running")
    assert (await two.call("GET", f"/1.0/vz/{container}/snapshots"))["metadata"] == []
    # The host was on: an operator's mistake, which holds until it is heard of again.
    assert hosts(two, container) == ["node1", "node2"]
    await _comes_back(two, "node2", container)
    shown = await node(two, "node2")
    assert (shown["status"], shown["mode"], shown["unmanaged"]) == ("Draining", "draining", [container])
    assert "fenced by admin" in shown["message"]
    # What nobody recovered goes on as it was, and nothing of the node can be recovered any more.
    assert await status(two, stays) == ("node2", "Running") and hosts(two, stays) == ["node2"]
    await two.refused("POST", f"/1.0/vz/{stays}", {"recover": True}, 409)
    assert effects(two, container, "node2")[-1] == "container.stop"
    await two.refused("POST", f"/1.0/vz/{name()}", {"source": EMPTY, "node": "node2"}, 409)
    await restore(two, "node2")
    shown = await node(two, "node2")
    assert (shown["status"], shown["mode"], shown["fenced_at"]) == ("Online", "active", None)


async def _comes_back(fleet: Cluster, which: str, container: str) -> None:
    """Start its agent; at every moment in which the node counts as reachable the container runs once."""
    task = asyncio.create_task(fleet.start_agent(which, status="Draining"))
    while not task.done():
        live = fleet.app.fleet.nodes[which]
        assert not live.reachable or hosts(fleet, container) == ["node1"]
        await asyncio.sleep(0)
    await task
    assert hosts(fleet, container) == ["node1"]


async def test_a_broken_return_is_caught(two: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above fails when nothing is stopped."""
    container = await make(two, start=True, node="node2")
    await fence(two, "node2")
    await two.done("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY})
    monkeypatch.setattr(Fencing, "_strays", lambda *_: [])
    with pytest.raises(AssertionError):
        await _comes_back(two, "node2", container)
    await until(lambda: _has_status(two, "node2", "Draining"), "it is back all the same")


async def _has_status(fleet: Cluster, which: str, expected: str) -> bool:
    return bool((await node(fleet, which))["status"] == expected)


async def test_a_node_is_not_back_before_the_older_generation_is_stopped(two: Cluster) -> None:
    container = await make(two, start=True, node="node2")
    await fence(two, "node2")
    await two.done("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY, "start": True})
    faults = [{"command": "container.stop", "container": container, "times": 1}]
    with scripted(two, "node2", faults=faults):
        task = asyncio.create_task(two.start_agent("node2", status="Draining"))

        async def told() -> bool:
            shown = await node(two, "node2")
            return shown["status"] == "Offline" and "a scripted fault" in shown["message"]

        await until(told, "the node says why it is not back", 15)
        # The agent comes again, and what failed is tried again.
        await task
    assert hosts(two, container) == ["node1"]


async def test_a_rebooted_host_does_not_start_what_runs_elsewhere(two: Cluster) -> None:
    config = {"boot.autostart": "true"}
    gone = await make(two, start=True, node="node2", config=config)
    stays = await make(two, start=True, node="node2", config=config)
    await fence(two, "node2")
    await two.done("POST", f"/1.0/vz/{gone}", {"recover": True, "source": EMPTY})
    _reboot(two, "node2")
    assert hosts(two, stays) == ["node2"] and await status(two, gone) == ("node1", "Running")
    await _comes_back(two, "node2", gone)
    await until(lambda: _shows(two, stays, ("node2", "Running")), "what belongs there is started")
    assert effects(two, stays, "node2") == ["container.create", "container.start", "container.start"]
    assert effects(two, gone, "node2") == ["container.create", "container.start"]


def _reboot(fleet: Cluster, which: str) -> None:
    """As if the host had booted since: its processes are gone, and its agent has started nothing yet."""
    world = node_directory(fleet, which) / "world.json"
    facts = json.loads(world.read_text(encoding="utf-8"))
    world.write_text(json.dumps({**facts, "boot_id": "another"}), encoding="utf-8")
    boot_record(load_agent(fleet.directory / which / "agent.json")).forget()


async def test_an_older_generation_started_by_hand_is_stopped(two: Cluster) -> None:
    container = await make(two, start=True, node="node2")
    await fence(two, "node2")
    await two.done("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY})
    await _comes_back(two, "node2", container)
    await lose(two, "node2")
    world = node_directory(two, "node2") / "world.json"
    facts = json.loads(world.read_text(encoding="utf-8"))
    facts["containers"][container]["status"] = 103
    world.write_text(json.dumps(facts), encoding="utf-8")
    assert hosts(two, container) == ["node1", "node2"]
    await _comes_back(two, "node2", container)


@contextmanager
def partitioned(fleet: Cluster, which: str) -> Iterator[None]:
    """The node's agent runs, but nothing that it says is heard."""
    key = fleet.app.fleet.nodes[which].record.public_key
    router = fleet.app.dispatcher._router
    router.deny(key)
    try:
        yield
    finally:
        router.allow(key)


async def _at_every_moment(fleet: Cluster, which: str, container: str, where: list[str]) -> None:
    """Until the node shows Draining: whenever it counts as reachable the container runs there."""
    while (live := fleet.app.fleet.nodes[which]).shown is not NodeStatus.DRAINING:
        assert not live.reachable
        await asyncio.sleep(0.01)
    assert hosts(fleet, container) == where


async def test_a_start_that_was_under_way_on_a_fenced_node_is_stopped(two: Cluster) -> None:
    container = await make(two, node="node2")
    with scripted(two, "node2", delays={"container.start": 12.0}):
        start = await two.call("PUT", f"/1.0/vz/{container}/state", {"action": "start"}, 202)
        await until(lambda: _accepted(two, start["operation"]), "its agent has begun")
        with partitioned(two, "node2"):
            await two.wait_for_node("node2", "Offline")
            await two.call("POST", "/1.0/nodes/node2/state", OFF, 200)
            ended = (await two.call("GET", f"{start['operation']}/wait?timeout=5"))["metadata"]
            assert (ended["status"], ended["err_code"]) == ("Failure", "fenced"), ended
            await two.done("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY, "start": True})
            assert hosts(two, container) == ["node1"]
        async with asyncio.timeout(40):
            await _at_every_moment(two, "node2", container, ["node1"])
    assert effects(two, container, "node2") == ["container.create", "container.start", "container.stop"]
    assert hosts(two, container) == ["node1"]


def _accepted(fleet: Cluster, url: str) -> bool:
    calls = fleet.app.dispatcher._peers["node2"].calls.values()
    return any(call.accepted for call in calls if call.command.startswith(url.rpartition("/")[2]))


async def test_fence_recovery_and_return_at_once_never_leave_two(tmp_path: Path) -> None:
    """Whichever comes first: in the end each container runs once, where its row says."""
    answers = []
    async with cluster(tmp_path, nodes=2, heartbeat_timeout=1.0) as fleet:
        for turn in range(8):
            container = await make(fleet, start=True, node="node2")
            with partitioned(fleet, "node2"):
                await fleet.wait_for_node("node2", "Offline")
                if turn % 2:
                    await fleet.call("POST", "/1.0/nodes/node2/state", OFF, 200)
            body = {"recover": True, "source": EMPTY, "start": True}
            fenced, recovered = await asyncio.gather(
                fleet.request("POST", "/1.0/nodes/node2/state", OFF),
                _after(fleet, turn / 50, container, body),
            )
            answers.append((fenced.status_code, recovered))
            await until(lambda: fleet.app.fleet.nodes["node2"].reachable, "node2 is back", 30)
            where, shown = await status(fleet, container)
            assert (hosts(fleet, container), shown) == ([where], "Running"), answers
            assert where == ("node1" if recovered == 202 else "node2")
            if (await node(fleet, "node2"))["mode"] != "active":
                await restore(fleet, "node2")


async def _after(fleet: Cluster, seconds: float, container: str, body: dict[str, Any]) -> int:
    """Recover at a moment that differs from turn to turn; follow it to its end."""
    await asyncio.sleep(seconds)
    answer = await fleet.request("POST", f"/1.0/vz/{container}", body)
    if answer.status_code == 202:
        await fleet.call("GET", f"{answer.json()['operation']}/wait?timeout=20")
    return answer.status_code


async def test_a_recovery_that_fails_can_be_tried_again(two: Cluster) -> None:
    container, other = await make(two, start=True, node="node2"), await make(two, node="node1")
    await fence(two, "node2")
    async with nothing_happens(two):
        answer = await two.refused("POST", f"/1.0/vz/{container}", {"recover": True}, 400)
        assert answer["metadata"]["field"] == "source"
        source = {"type": "copy", "source": container}
        await two.refused("POST", f"/1.0/vz/{container}", {"recover": True, "source": source}, 400)
        await two.refused("POST", f"/1.0/vz/{container}", {"recover": False}, 400)
        await two.refused("POST", f"/1.0/vz/{other}", {"recover": True}, 409)
        await two.refused("POST", f"/1.0/vz/{name()}", {"recover": True}, 404)
        await two.refused("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY, "node": "node2"}, 409)
    with scripted(two, "node1", faults=[{"command": "container.create", "container": container}]):
        ended = await two.operation("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY})
    assert ended["status"] == "Failure" and "a scripted fault" in ended["err"]
    shown = await two.show(container)
    assert shown["node"] == "node2" and "fenced by admin" in shown["status"]["reason"]
    body = {"recover": True, "source": {"type": "copy", "source": other}, "start": True}
    await two.done("POST", f"/1.0/vz/{container}", body)
    assert await status(two, container) == ("node1", "Running") and await status(two, other) == ("node1", "Stopped")


async def test_a_fence_holds_through_a_restart_of_the_controller(two: Cluster) -> None:
    container = await make(two, start=True, node="node2")
    await fence(two, "node2")
    await two.stop_controller()
    await two.start_controller()
    await two.wait_for_node("node1", "Online")
    assert (await node(two, "node2"))["mode"] == "fenced"
    await two.done("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY, "start": True})
    await _comes_back(two, "node2", container)


# ---------------------------------------------------------------- remove


async def test_a_removed_node_is_shut_out_at_once(two: Cluster) -> None:
    container = await make(two, node="node2")
    async with nothing_happens(two):
        answer = await two.refused("DELETE", "/1.0/nodes/node2", None, 409)
        assert answer["metadata"]["containers"] == [f"/1.0/vz/{container}"] and container in answer["error"]
        # Its host is on: nothing of it is forgotten.
        await two.refused("DELETE", "/1.0/nodes/node2?force=1", None, 409)
    await two.done("DELETE", f"/1.0/vz/{container}")
    assert two.app.dispatcher.connected("node2")
    await two.call("DELETE", "/1.0/nodes/node2")
    # Nothing that it says is heard any more, from the answer on.
    assert not two.app.dispatcher.connected("node2")
    await two.refused("GET", "/1.0/nodes/node2", None, 404)
    await two.refused("POST", "/1.0/nodes/node2/state", OFF, 404)


async def test_a_fenced_node_is_removed_with_what_it_had(two: Cluster) -> None:
    lost, forgotten = await make(two, node="node2"), await make(two, node="node2")
    await fence(two, "node2")
    async with nothing_happens(two):
        await two.refused("DELETE", f"/1.0/vz/{lost}", None, 409)
        await two.refused("DELETE", "/1.0/nodes/node2", None, 409)
    await two.done("DELETE", f"/1.0/vz/{lost}?force=1")
    await two.refused("GET", f"/1.0/vz/{lost}", None, 404)
    await two.call("DELETE", "/1.0/nodes/node2?force=1")
    await two.refused("GET", f"/1.0/vz/{forgotten}", None, 404)
    await two.refused("GET", "/1.0/nodes/node2", None, 404)


async def test_a_lost_node_is_fenced_also_while_nothing_else_is_written(two: Cluster) -> None:
    container = await make(two, node="node2")
    await lose(two, "node2")
    two.app.reconciliation._delivered.discard("node2")
    two.app.reconciliation.begin("rows were lost")
    await two.refused("POST", "/1.0/nodes/node1/state", {"action": "drain"}, 503)
    await two.refused("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY}, 503)
    # The last one that was awaited.
    await two.call("POST", "/1.0/nodes/node2/state", OFF, 200)
    await two.done("POST", f"/1.0/vz/{container}", {"recover": True, "source": EMPTY})


async def test_what_its_node_does_not_have_is_left_by_a_drain(two: Cluster) -> None:
    gone = await make(two, node="node1")
    live = two.app.fleet.containers[gone]
    live.report = None
    body = {"action": "drain", "preview": True}
    [task] = (await two.call("POST", "/1.0/nodes/node1/state", body, 200))["metadata"]
    assert (task["container"], task["action"]) == (gone, "leave") and "does not have it" in task["reason"]
