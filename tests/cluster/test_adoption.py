"""Adopting containers of nobody's: our own that were left behind, those made by hand, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from agent.drivers.fake import FakeDriver
from common.errors import NotFound
from common.reports import ContainerSpec
from common.states import Status
from tests.cluster.test_drift import driver_of, shown, told
from tests.helpers.api import effects, make, name, nothing_happens, scripted
from tests.helpers.cluster import Cluster, cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
ADOPT: dict[str, Any] = {"source": {"type": "adopt"}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path_factory.mktemp("fleet"), nodes=0) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def host(fleet: Cluster) -> AsyncIterator[tuple[str, FakeDriver]]:
    node = name("node")
    await fleet.join(node)
    driver = driver_of(fleet, node)
    await fleet.start_agent(node, driver)
    yield node, driver
    await fleet.stop_agent(node)


def left(container: str, hwaddr: str = "00:16:3e:11:22:33", **config: str) -> ContainerSpec:
    """What vzfleet once made, of a generation that nobody has any more."""
    keys = {"limits.memory": "64MiB", **{key.replace("__", "."): value for key, value in config.items()}}
    return ContainerSpec(container, 3, "left-over", hwaddr, keys)


async def appeared(fleet: Cluster, host: tuple[str, FakeDriver], spec: ContainerSpec | None, status: Status) -> str:
    node, driver = host
    container = name() if spec is None else spec.id
    driver.appear(container, spec, status)
    await until(lambda: _is_unmanaged(fleet, node, container), "it is shown")
    return container


async def _is_unmanaged(fleet: Cluster, node: str, container: str) -> bool:
    return container in (await fleet.call("GET", f"/1.0/nodes/{node}"))["metadata"]["unmanaged"]


@pytest.mark.parametrize("status", [Status.RUNNING, Status.STOPPED, Status.FROZEN])
async def test_one_that_was_left_behind(fleet: Cluster, host: tuple[str, FakeDriver], status: Status) -> None:
    node, driver = host
    spec = left(name(), hwaddr=f"00:16:3e:11:00:{status:02x}")
    container = await appeared(fleet, host, spec, status)
    details = (await fleet.call("GET", f"/1.0/nodes/{node}"))["metadata"]["unmanaged_containers"]
    assert details == [
        {
            "id": container,
            "status": status.text,
            "format": "own",
            "generation": 3,
            "hostname": "left-over",
        }
    ]
    driver._node.find(container).snapshots.append(_snapshot())
    operation = await fleet.done("POST", f"/1.0/vz/{container}", {**ADOPT, "node": node, "description": "found"})
    assert operation["kind"] == "container.adopt"
    view = await fleet.show(container)
    assert (view["hostname"], view["config"], view["description"]) == ("left-over", spec.config, "found")
    assert view["status"]["status"] == status.text and view["drift"] == []
    there = driver._node.find(container)
    assert (there.content, there.spec.hwaddr, there.status, there.before) == (
        "made by hand",
        spec.hwaddr,
        status,
        None,
    )
    assert there.spec.generation > 3
    snapshot = (await fleet.call("GET", f"/1.0/vz/{container}/snapshots/s1"))["metadata"]
    assert snapshot["created_at"].startswith("2026-01-01T00:00:00")
    assert not await _is_unmanaged(fleet, node, container)
    await until(lambda: _told(fleet, container, "container-unmanaged-gone"), "it is told")
    actions = await told(fleet, container)
    assert "container-adopted" in actions and "container-unmanaged-found" in actions
    await fleet.done("DELETE", f"/1.0/vz/{container}?force=1")
    with pytest.raises(NotFound):
        driver._node.find(container)


def _snapshot() -> Any:
    from agent.drivers.fake_state import FakeSnapshot

    return FakeSnapshot("s1", 1767225600.0, "then")


async def _told(fleet: Cluster, container: str, action: str) -> bool:
    return action in await told(fleet, container)


async def test_one_made_by_hand(fleet: Cluster, host: tuple[str, FakeDriver]) -> None:
    node, driver = host
    container = await appeared(fleet, host, None, Status.STOPPED)
    details = (await fleet.call("GET", f"/1.0/nodes/{node}"))["metadata"]["unmanaged_containers"]
    assert [(each["id"], each["format"], each["generation"]) for each in details] == [(container, "foreign", None)]
    body = {**ADOPT, "id": container, "node": node, "hostname": "mine", "config": {"limits.processes": "50"}}
    await fleet.done("POST", "/1.0/vz", body)
    view = await fleet.show(container)
    assert (view["hostname"], view["config"]) == ("mine", {"limits.processes": "50"})
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "start"})
    await shown(fleet, container)
    assert driver._node.find(container).content == "made by hand"


async def test_what_is_refused(fleet: Cluster, host: tuple[str, FakeDriver]) -> None:
    node, _ = host
    mine = await make(fleet, node=node)
    address = fleet.app.fleet.containers[mine].record.hwaddr
    running = await appeared(fleet, host, None, Status.RUNNING)
    taken = await appeared(fleet, host, left(name(), hwaddr=address), Status.STOPPED)
    large = await appeared(fleet, host, left(name(), "00:16:3e:aa:00:01", limits__disk="300GB"), Status.STOPPED)
    whole = await appeared(fleet, host, left(name(), "00:16:3e:aa:00:02"), Status.STOPPED)
    refusals: list[tuple[str, dict[str, Any], int, str]] = [
        (running, {}, 409, "stopped"),
        (taken, {}, 409, "hardware address"),
        (large, {}, 409, "disk"),
        (mine, {}, 409, "exists already"),
        (name(), {}, 404, "no unmanaged container"),
        (whole, {"node": "nowhere"}, 404, "not found"),
        (whole, {"start": True}, 400, "goes on as it is"),
        (whole, {"config": {"limits.memory": "much"}}, 400, "limits.memory"),
        (whole, {"config": {"security.privileged": "true"}}, 400, "kind"),
        (whole, {"hostname": "a b"}, 400, "hostname"),
    ]
    async with nothing_happens(fleet):
        for container, fields, code, text in refusals:
            answer = await fleet.refused("POST", f"/1.0/vz/{container}", {**ADOPT, "node": node, **fields}, code)
            assert text in str(answer), answer
        answer = await fleet.refused("POST", f"/1.0/vz/{whole}", ADOPT, 400)
        assert (answer["metadata"]["field"], answer["metadata"]["allowed"]) == ("node", node)
        await fleet.refused("POST", "/1.0/vz", {**ADOPT, "node": node}, 400)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_one_that_fails_is_as_before(fleet: Cluster, host: tuple[str, FakeDriver], when: str) -> None:
    node, driver = host
    spec = left(name(), "00:16:3e:bb:00:01")
    container = await appeared(fleet, host, spec, Status.RUNNING)
    faults = [{"command": "container.adopt", "container": container, "when": when, "text": "no luck"}]
    with scripted(fleet, node, faults=faults):
        operation = await fleet.operation("POST", f"/1.0/vz/{container}", {**ADOPT, "node": node, "hostname": "x"})
    assert (operation["status"], operation["err"]) == ("Failure", "no luck")
    await fleet.refused("GET", f"/1.0/vz/{container}", None, 404)
    there = driver._node.find(container)
    assert (msgspec.to_builtins(there.spec), there.before) == (msgspec.to_builtins(spec), None)
    assert await _is_unmanaged(fleet, node, container)
    await fleet.done("POST", f"/1.0/vz/{container}", {**ADOPT, "node": node})
    assert effects(fleet, container)[-2:] == ["container.adopt", "container.settle"]
    await fleet.done("DELETE", f"/1.0/vz/{container}?force=1")


async def test_what_a_move_left_behind_can_be_adopted_under_its_old_id(fleet: Cluster) -> None:
    """After the moved one is gone its id and address are free."""
    nodes = [name("node"), name("node")]
    for node in nodes:
        await fleet.join(node)
        await fleet.start_agent(node)
    container = await make(fleet, node=nodes[0])
    with scripted(fleet, nodes[0], faults=[{"command": "container.delete", "container": container, "times": 1}]):
        await fleet.done("POST", f"/1.0/vz/{container}", {"migration": True, "node": nodes[1]})
    await until(lambda: _is_unmanaged(fleet, nodes[0], container), "it is shown")
    await fleet.refused("POST", f"/1.0/vz/{container}", {**ADOPT, "node": nodes[0]}, 409)
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    await fleet.done("POST", f"/1.0/vz/{container}", {**ADOPT, "node": nodes[0]})
    assert (await fleet.show(container))["node"] == nodes[0]
    for node in nodes:
        await fleet.stop_agent(node)


async def test_what_a_failed_creation_left_can_be_adopted(fleet: Cluster, host: tuple[str, FakeDriver]) -> None:
    node, driver = host
    container = name()
    faults = [
        {"command": "container.create", "container": container, "when": "after"},
        {"command": "container.delete", "container": container},
    ]
    with scripted(fleet, node, faults=faults):
        await fleet.operation("POST", f"/1.0/vz/{container}", {"source": {"type": "none"}, "node": node})
    assert (await fleet.show(container))["status"]["status"] == "Error"
    await fleet.done("POST", f"/1.0/vz/{container}", {**ADOPT, "node": node})
    assert (await fleet.show(container))["status"]["status"] == "Stopped"
    await shown(fleet, container)
    assert driver._node.find(container).before is None
