"""/1.0/vz/<id>/state: actions, what refuses them, stops by force, and containers that change by themselves."""

from __future__ import annotations

import time

import pytest

from tests.helpers.api import effects, make, nothing_happens, scripted
from tests.helpers.cluster import Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
CODES = {"Stopped": 102, "Running": 103, "Frozen": 110}
# The state in which the container is brought first, and what each action leads to from there; None is refused.
ACTIONS = {
    "Stopped": {"start": "Running", "stop": None, "restart": None, "freeze": None, "unfreeze": None},
    "Running": {"start": None, "stop": "Stopped", "restart": "Running", "freeze": "Frozen", "unfreeze": None},
    "Frozen": {"start": "Running", "stop": None, "restart": None, "freeze": None, "unfreeze": "Running"},
}


async def brought_to(fleet: Cluster, status: str) -> str:
    container = await make(fleet, start=status != "Stopped")
    if status == "Frozen":
        await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "freeze"})
    assert await status_of(fleet, container) == status
    return container


async def status_of(fleet: Cluster, container: str) -> str:
    status = (await fleet.show(container))["status"]
    assert status["status_code"] == CODES.get(status["status"], status["status_code"])
    return str(status["status"])


@pytest.mark.parametrize("action", ["start", "stop", "restart", "freeze", "unfreeze"])
@pytest.mark.parametrize("status", ["Stopped", "Running", "Frozen"])
async def test_every_action_in_every_state(fleet: Cluster, status: str, action: str) -> None:
    container = await brought_to(fleet, status)
    url, body = f"/1.0/vz/{container}/state", {"action": action}
    after = ACTIONS[status][action]
    if after is None:
        async with nothing_happens(fleet):
            answer = await fleet.refused("PUT", url, body, 400)
        assert answer["metadata"]["field"] == "action" and answer["metadata"]["allowed"]
        assert await status_of(fleet, container) == status
        return
    operation = await fleet.done("PUT", url, body)
    assert operation["resources"] == {"containers": [f"/1.0/vz/{container}"]}
    assert await status_of(fleet, container) == after
    assert (await fleet.call("GET", url))["metadata"]["status"] == after


@pytest.mark.parametrize(("action", "after"), [("stop", "Stopped"), ("restart", "Running")])
async def test_a_frozen_container_stops_by_force(fleet: Cluster, action: str, after: str) -> None:
    container = await brought_to(fleet, "Frozen")
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": action, "force": True})
    assert await status_of(fleet, container) == after


async def test_a_restart_is_a_stop_and_a_start(fleet: Cluster) -> None:
    container = await brought_to(fleet, "Running")
    before = (await fleet.call("GET", f"/1.0/vz/{container}/state"))["metadata"]["started_at"]
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "restart"})
    assert effects(fleet, container) == ["container.create", "container.start", "container.stop", "container.start"]
    assert (await fleet.call("GET", f"/1.0/vz/{container}/state"))["metadata"]["started_at"] > before


async def test_a_graceful_stop_fails_when_its_time_passes_and_force_does_not_ask(fleet: Cluster) -> None:
    container = await make(fleet, start=True, node="node1")
    url = f"/1.0/vz/{container}/state"
    with scripted(fleet, "node1", stubborn=[container]):
        operation = await fleet.operation("PUT", url, {"action": "stop", "timeout": 0.2})
        assert operation["status"] == "Failure" and operation["err_code"] == "deadline-passed"
        assert "did not stop within 0.2 s" in operation["err"]
        assert await status_of(fleet, container) == "Running"
        await fleet.done("PUT", url, {"action": "stop", "force": True})
    assert await status_of(fleet, container) == "Stopped"


async def test_a_failed_action_says_why_and_leaves_the_container_usable(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    url = f"/1.0/vz/{container}/state"
    with scripted(fleet, "node1", faults=[{"command": "container.start", "container": container, "text": "no luck"}]):
        operation = await fleet.operation("PUT", url, {"action": "start"})
    assert (operation["status"], operation["err"]) == ("Failure", "no luck")
    assert await status_of(fleet, container) == "Stopped"
    await fleet.done("PUT", url, {"action": "start"})


async def test_a_container_that_dies_by_itself_shows_it_within_two_seconds(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", lifetimes={container: 0.3}):
        started = time.monotonic()
        await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "start"})

        async def dead() -> bool:
            return await status_of(fleet, container) == "Stopped"

        await until(dead, "the death is shown", seconds=10)
    assert time.monotonic() - started < 0.3 + 2
    state = (await fleet.call("GET", f"/1.0/vz/{container}/state"))["metadata"]
    assert state["status_code"] == 102
    # It is no operation's doing, and it can be started again.
    assert effects(fleet, container) == ["container.create", "container.start"]
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "start"})


async def test_samples_keep_coming(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    first = (await fleet.call("GET", f"/1.0/vz/{container}/state"))["metadata"]

    async def moved_on() -> bool:
        state = (await fleet.call("GET", f"/1.0/vz/{container}/state"))["metadata"]
        return bool(state["sampled_at"] > first["sampled_at"] and state["cpu"]["usage"] > first["cpu"]["usage"])

    await until(moved_on, "newer figures")
