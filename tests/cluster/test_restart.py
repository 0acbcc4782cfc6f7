"""The controller and the agents restarted in between: what was there is there again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.api import EMPTY, effects, make, name, scripted
from tests.helpers.cluster import BUSYBOX, Cluster, cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def _is(fleet: Cluster, container: str, status: str) -> bool:
    return bool((await fleet.show(container))["status"]["status"] == status)


async def restart_controller(fleet: Cluster) -> None:
    await fleet.stop_controller()
    await fleet.start_controller()


async def test_everything_is_kept_when_the_controller_restarts(fleet: Cluster) -> None:
    config = {"limits.memory": "128MB", "user.a": "1"}
    container = await make(fleet, start=True, source=BUSYBOX, node="node1", config=config, description="d")
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "s"})
    shown = await fleet.show(container)
    tag = (await fleet.request("GET", f"/1.0/vz/{container}")).headers["ETag"]
    list_tag = (await fleet.request("GET", "/1.0/vz")).headers["ETag"]
    images = (await fleet.call("GET", "/1.0/images?recursion=1"))["metadata"]
    operations = (await fleet.call("GET", f"/1.0/operations?container={container}&recursion=1"))["metadata"]
    snapshots = (await fleet.call("GET", f"/1.0/vz/{container}/snapshots?recursion=1"))["metadata"]

    await restart_controller(fleet)

    # The token is good still, and the operations are kept, before any node is back.
    assert (await fleet.call("GET", f"/1.0/operations?container={container}&recursion=1"))["metadata"] == operations
    assert (await fleet.call("GET", f"/1.0/vz/{container}/snapshots?recursion=1"))["metadata"] == snapshots
    assert (await fleet.call("GET", "/1.0/images?recursion=1"))["metadata"] == images
    await fleet.wait_for_node("node1", "Online")
    await until(lambda: _is(fleet, container, "Running"), "it shows Running again")
    after = await fleet.show(container)
    assert {**after, "status": 0} == {**shown, "status": 0}
    assert after["status"]["machine"][0].keys() == shown["status"]["machine"][0].keys()
    assert (await fleet.request("GET", f"/1.0/vz/{container}")).headers["ETag"] == tag
    # A revision of the former controller is nothing to this one.
    stale = await fleet.request("GET", "/1.0/vz", headers={"If-None-Match": list_tag})
    assert stale.status_code == 200
    await fleet.wait_for_node("node2", "Online")
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {}})


async def test_an_operation_goes_on_where_it_stood(fleet: Cluster) -> None:
    container = name()
    with scripted(fleet, "node1", delays={"container.start": 1.0}):
        given = {"source": EMPTY, "node": "node1", "start": True}
        answer = await fleet.call("POST", f"/1.0/vz/{container}", given, 202)
        await until(lambda: effects(fleet, container, "node1") == ["container.create"], "it is created")
        await restart_controller(fleet)
        assert await _is(fleet, container, "Pending")
        ended = (await fleet.call("GET", f"{answer['operation']}/wait?timeout=20"))["metadata"]
    assert ended["status"] == "Success", ended
    assert effects(fleet, container, "node1") == ["container.create", "container.start"]
    await until(lambda: _is(fleet, container, "Running"), "it runs")
    await fleet.wait_for_node("node2", "Online")


async def test_an_agent_that_restarts_keeps_its_containers(fleet: Cluster) -> None:
    running, stopped = await make(fleet, start=True, node="node2"), await make(fleet, node="node2")
    before = (await fleet.call("GET", f"/1.0/vz/{running}/state"))["metadata"]
    await fleet.stop_agent("node2")
    await fleet.start_agent("node2")
    await until(lambda: _is(fleet, running, "Running"), "it shows Running")
    after = (await fleet.call("GET", f"/1.0/vz/{running}/state"))["metadata"]
    assert after["started_at"] == before["started_at"] and after["network"].keys() == before["network"].keys()
    assert await _is(fleet, stopped, "Stopped")
    assert effects(fleet, running) == ["container.create", "container.start"]


async def test_an_image_held_for_privileged_containers_alone_is_unpacked_for_others_too(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=1) as fleet:
        privileged = {"security.privileged": "true"}
        container = await make(fleet, source=BUSYBOX, config=privileged)
        fingerprint = (await fleet.show(container))["image"]["fingerprint"]
        await fleet.stop_agent("node1")
        await fleet.start_agent("node1")
        await fleet.wait_for_node("node1", "Online")
        await make(fleet, source=BUSYBOX)
        for _ in range(2):
            await fleet.done("DELETE", f"/1.0/images/{fingerprint}")
            await make(fleet, source=BUSYBOX, config=privileged)
        # It is dropped also where the node has it for privileged containers alone.
        assert effects(fleet, fingerprint) == ["image.ensure", *["image.ensure", "image.drop"] * 2, "image.ensure"]


async def test_an_operation_survives_its_agents_restart(fleet: Cluster) -> None:
    container = name()
    with scripted(fleet, "node2", delays={"container.start": 0.8}):
        given = {"source": EMPTY, "node": "node2", "start": True}
        answer = await fleet.call("POST", f"/1.0/vz/{container}", given, 202)
        await until(lambda: effects(fleet, container, "node2") == ["container.create"], "it is created")
        await fleet.stop_agent("node2")
        await fleet.start_agent("node2")
        ended = (await fleet.call("GET", f"{answer['operation']}/wait?timeout=25"))["metadata"]
    assert ended["status"] == "Success", ended
    assert effects(fleet, container, "node2") == ["container.create", "container.start"]


async def test_a_node_away_over_the_controllers_restart_keeps_its_last_figures(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=2, heartbeat_timeout=3.0) as fleet:
        container = await make(fleet, start=True, node="node1", config={"limits.memory": "256MB"})
        failed = name()
        with scripted(fleet, "node1", faults=[{"command": "container.create", "container": failed}]):
            await fleet.operation("POST", f"/1.0/vz/{failed}", {"source": EMPTY, "node": "node1"})
        await fleet.stop_agent("node1")
        await fleet.wait_for_node("node1", "Offline")
        before = (await fleet.show(container))["status"]
        await restart_controller(fleet)
        after = (await fleet.show(container))["status"]
        assert (after["status"], after["status_code"], after["last_status"]) == ("Error", 112, "Running")
        assert "node1 is out of reach" in after["reason"]
        assert after["machine"] == before["machine"] and after["sampled_at"] == before["sampled_at"]
        assert None not in after["machine"][0].values()
        node = (await fleet.call("GET", "/1.0/nodes/node1"))["metadata"]
        assert node["status"] == "Offline" and node["last_seen"]
        # A failed creation is kept with its reason too.
        assert "a scripted fault" in (await fleet.show(failed))["status"]["reason"]
        await fleet.start_agent("node1")
        await until(lambda: _is(fleet, container, "Running"), "it is back")
