"""/1.0/vz/<id>: what GET shows, creation from an image or empty, failures, deletion."""

from __future__ import annotations

import re
import string
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.api import EMPTY, TIME, effects, make, name, nothing_happens, scripted
from tests.helpers.cluster import BUSYBOX, Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIZE = re.compile(r"(0|[1-9]\d{0,2})(\.\d?[1-9])?(B|kB|MB|GB|TB)")
PERCENT = re.compile(r"(0|[1-9]\d*)(\.\d?[1-9])?%")
FIELDS = {"id", "hostname", "node", "description", "config", "image", "created_at", "status", "drift"}
MACHINE = {"disk_space", "disk_usage", "memory", "free_memory", "cpu_load", "ip_address"}
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---------------------------------------------------------------- GET


async def test_a_running_container_shows_the_documents_fields_and_units(fleet: Cluster) -> None:
    limits = {"limits.cpus": "2", "limits.memory": "256MB", "limits.disk": "5GB", "user.owner": "me"}
    fields = {"hostname": "my-container", "config": limits, "description": "mine", "node": "node2"}
    container = await make(fleet, start=True, source=BUSYBOX, **fields)
    shown = await fleet.show(container)
    assert shown.keys() == FIELDS
    assert (shown["id"], shown["hostname"], shown["node"]) == (container, "my-container", "node2")
    assert (shown["description"], shown["config"]) == ("mine", limits)
    assert shown["image"]["os"] == "busybox" and re.fullmatch("[0-9a-f]{64}", shown["image"]["fingerprint"])
    assert TIME.fullmatch(shown["created_at"])
    status = shown["status"]
    assert status.keys() == {"status", "status_code", "machine", "sampled_at"}
    assert (status["status"], status["status_code"]) == ("Running", 103)
    assert TIME.fullmatch(status["sampled_at"]) and len(status["machine"]) == 1
    machine = status["machine"][0]
    assert machine.keys() == MACHINE
    assert (machine["disk_space"], machine["memory"]) == ("5GB", "256MB")
    assert SIZE.fullmatch(machine["disk_usage"]) and SIZE.fullmatch(machine["free_memory"])
    assert PERCENT.fullmatch(machine["cpu_load"]) and machine["ip_address"].startswith("10.")


async def test_what_is_not_known_of_a_stopped_container_is_null(fleet: Cluster) -> None:
    container = await make(fleet)
    shown = await fleet.show(container)
    machine = shown["status"]["machine"][0]
    assert (shown["status"]["status"], shown["status"]["status_code"]) == ("Stopped", 102)
    assert machine["free_memory"] is machine["cpu_load"] is machine["ip_address"] is None
    assert shown["image"] is None and shown["config"] == {} and shown["description"] == ""
    # Without limits the disk is the pool's, the memory the node's (those of the fake node).
    assert (machine["disk_space"], machine["memory"]) == ("200GB", "16GB")
    assert SIZE.fullmatch(machine["disk_usage"])


async def test_the_state_has_the_same_figures_in_plain_numbers(fleet: Cluster) -> None:
    container = await make(fleet, start=True, config={"limits.memory": "256MB", "limits.disk": "5GB"})
    state = (await fleet.call("GET", f"/1.0/vz/{container}/state"))["metadata"]
    assert (state["status"], state["status_code"]) == ("Running", 103)
    assert state["disk"]["root"]["total"] == 5 * 10**9 and state["disk"]["root"]["usage"] > 0
    memory = state["memory"]
    assert memory["total"] == 256 * 10**6
    assert memory["free"] == memory["total"] - (memory["usage"] - memory["reclaimable"])
    assert isinstance(state["cpu"]["usage"], int) and state["processes"] >= 1
    interface = state["network"]["eth0"]
    assert interface["hwaddr"].startswith("00:16:3e:") and interface["type"] == "broadcast"
    address = interface["addresses"][0]
    assert address.keys() == {"family", "address", "netmask", "scope"}
    assert (await fleet.show(container))["status"]["machine"][0]["ip_address"] == address["address"]
    assert all(isinstance(count, int) for count in interface["counters"].values())


async def test_figures_after_a_success_are_of_a_sample_taken_at_once(fleet: Cluster) -> None:
    container = await make(fleet)
    for _ in range(3):
        await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "start"})
        machine = (await fleet.show(container))["status"]["machine"][0]
        assert None not in machine.values()
        await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "stop", "force": True})
        machine = (await fleet.show(container))["status"]["machine"][0]
        assert machine["ip_address"] is machine["cpu_load"] is None


# ---------------------------------------------------------------- POST


async def test_creation_from_an_image_by_properties_alone(fleet: Cluster) -> None:
    container = await make(fleet, source=BUSYBOX)
    shown = await fleet.show(container)
    # Without a hostname it is called by its id, and nobody starts it unasked.
    assert shown["hostname"] == container and shown["status"]["status"] == "Stopped"
    assert effects(fleet, container) == ["container.create"]


async def test_creation_from_a_fingerprint_and_its_prefix(fleet: Cluster) -> None:
    fingerprint = (await fleet.show(await make(fleet, source=BUSYBOX)))["image"]["fingerprint"]
    for wanted in (fingerprint, fingerprint[:12]):
        container = await make(fleet, source={"type": "image", "fingerprint": wanted})
        assert (await fleet.show(container))["image"]["fingerprint"] == fingerprint


async def test_create_and_start_in_one_operation(fleet: Cluster) -> None:
    container = name()
    operation = await fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY, "start": True})
    assert operation["resources"] == {"containers": [f"/1.0/vz/{container}"]}
    assert (await fleet.show(container))["status"]["status"] == "Running"
    assert effects(fleet, container) == ["container.create", "container.start"]


@pytest.mark.parametrize("node", ["node1", "node2"])
async def test_a_pinned_container_is_on_its_node(fleet: Cluster, node: str) -> None:
    container = name()
    operation = await fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": node})
    other = {"node1": "node2", "node2": "node1"}[node]
    reasons = {node: "pinned by the request", other: f"the request names node {node}"}
    assert operation["metadata"]["placement"] == reasons and operation["location"] == node
    assert (await fleet.show(container))["node"] == node
    assert effects(fleet, container, node) == ["container.create"]


async def test_the_reasons_of_every_node_stay_with_the_operation(fleet: Cluster) -> None:
    operation = await fleet.done("POST", f"/1.0/vz/{name()}", {"source": EMPTY})
    kept = (await fleet.call("GET", f"/1.0/operations/{operation['id']}"))["metadata"]
    assert kept["metadata"]["placement"].keys() == {"node1", "node2"}
    assert kept["metadata"]["placement"][kept["location"]].startswith("chosen: ")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"limits.cpus": "9"}, "8 CPUs, 9 are asked for"),
        ({"limits.memory": "17GB"}, "17GB are asked for"),
        ({"limits.disk": "201GB"}, "201GB are asked for"),
    ],
)
async def test_what_fits_nowhere_is_409_with_the_reasons(fleet: Cluster, config: dict[str, str], reason: str) -> None:
    async with nothing_happens(fleet):
        given = {"source": EMPTY, "config": config}
        answer = await fleet.refused("POST", f"/1.0/vz/{name()}", given, 409)
        pinned = await fleet.refused("POST", f"/1.0/vz/{name()}", {**given, "node": "node1"}, 409)
    assert answer["metadata"]["code"] == "no-placement" and answer["metadata"]["field"] == "node"
    nodes = answer["metadata"]["nodes"]
    assert nodes.keys() == {"node1", "node2"} and all(reason in each for each in nodes.values())
    assert reason in answer["error"] and reason in pinned["metadata"]["nodes"]["node1"]


async def test_what_was_promised_is_reserved(fleet: Cluster) -> None:
    half = {"source": EMPTY, "config": {"limits.memory": "9GB"}}
    first, second = name(), name()
    operations = [await fleet.done("POST", f"/1.0/vz/{each}", half) for each in (first, second)]
    assert {operation["location"] for operation in operations} == {"node1", "node2"}
    answer = await fleet.refused("POST", f"/1.0/vz/{name()}", half, 409)
    assert "9GB are asked for" in answer["error"]
    for each in (first, second):
        await fleet.done("DELETE", f"/1.0/vz/{each}")
    await fleet.done("POST", f"/1.0/vz/{first}", half)
    await fleet.done("DELETE", f"/1.0/vz/{first}")


async def test_post_on_the_collection_chooses_an_id(fleet: Cluster) -> None:
    operation = await fleet.done("POST", "/1.0/vz", {"hostname": "chosen", "source": EMPTY})
    [url] = operation["resources"]["containers"]
    shown = (await fleet.call("GET", url))["metadata"]
    assert url == f"/1.0/vz/{shown['id']}" and shown["hostname"] == "chosen"


async def test_post_on_the_collection_takes_an_id_too(fleet: Cluster) -> None:
    container = name()
    operation = await fleet.done("POST", "/1.0/vz", {"id": container, "source": EMPTY})
    assert operation["resources"]["containers"] == [f"/1.0/vz/{container}"]


async def test_a_taken_id_is_409(fleet: Cluster) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        for path in (f"/1.0/vz/{container}", "/1.0/vz"):
            extra = {} if path != "/1.0/vz" else {"id": container}
            answer = await fleet.refused("POST", path, {"source": EMPTY, **extra}, 409)
            assert answer["metadata"] == {"code": "conflict", "field": "id"}


ID = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
HOSTNAME = st.text(st.sampled_from(sorted(set(map(chr, range(33, 127))) - set("/:,"))), min_size=1, max_size=64)
BAD_HOSTNAME = st.one_of(
    st.text(st.sampled_from(string.ascii_letters), min_size=65, max_size=80),
    st.builds(
        lambda start, bad, end: start + bad + end,
        HOSTNAME,
        st.one_of(st.sampled_from("/:, \t\n\x00\x7f"), st.characters(min_codepoint=128, exclude_categories=["Cs"])),
        HOSTNAME,
    ),
)


@FEW
@given(id=ID, hostname=HOSTNAME)
async def test_every_id_and_hostname_that_the_rules_allow(fleet: Cluster, id: str, hostname: str) -> None:
    await fleet.done("POST", f"/1.0/vz/{id}", {"hostname": hostname, "source": EMPTY})
    shown = await fleet.show(id)
    assert (shown["id"], shown["hostname"]) == (id, hostname)
    await fleet.done("DELETE", f"/1.0/vz/{id}")


@FEW
@given(hostname=BAD_HOSTNAME)
async def test_every_other_hostname_is_refused(fleet: Cluster, hostname: str) -> None:
    answer = await fleet.refused("POST", f"/1.0/vz/{name()}", {"hostname": hostname, "source": EMPTY}, 400)
    assert answer["metadata"]["field"] == "hostname" and "1-64" in answer["metadata"]["allowed"]


# ---------------------------------------------------------------- while it lasts, and when it fails


async def test_a_container_exists_as_pending_from_the_202_on(fleet: Cluster) -> None:
    container = name()
    with scripted(fleet, "node1", delays={"container.create": 1.0}):
        given = {"source": EMPTY, "node": "node1", "hostname": "early", "start": True}
        answer = await fleet.call("POST", f"/1.0/vz/{container}", given, 202)
        shown = await fleet.show(container)
        assert shown["hostname"] == "early" and shown["status"]["status"] == "Pending"
        assert shown["status"]["status_code"] == 105
        assert f"/1.0/vz/{container}" in (await fleet.call("GET", "/1.0/vz?status=Pending"))["metadata"]
        await until(lambda: _is(fleet, container, "Running"), "it can be polled to the end")
    assert (await fleet.call("GET", answer["operation"]))["metadata"]["status"] == "Success"


async def _is(fleet: Cluster, container: str, status: str) -> bool:
    return bool((await fleet.show(container))["status"]["status"] == status)


async def test_while_an_operation_works_on_it_others_are_409_with_its_url(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", delays={"container.start": 1.5}):
        answer = await fleet.call("PUT", f"/1.0/vz/{container}/state", {"action": "start"}, 202)
        for method, path, body in (
            ("PUT", "/state", {"action": "start"}),
            ("PUT", "", {"config": {}}),
            ("POST", "", {"hostname": "x"}),
            ("POST", "", {"source": EMPTY}),
            ("POST", "/snapshots", {}),
            ("DELETE", "", None),
        ):
            busy = await fleet.refused(method, f"/1.0/vz/{container}{path}", body, 409)
            assert busy["metadata"] == {"code": "busy", "operation": answer["operation"]}, (method, path)
        copy = {"source": {"type": "copy", "source": container}}
        busy = await fleet.refused("POST", f"/1.0/vz/{name()}", copy, 409)
        assert busy["metadata"]["operation"] == answer["operation"]
        await fleet.call("GET", f"{answer['operation']}/wait")
    assert effects(fleet, container) == ["container.create", "container.start"]


FAULT = {"command": "container.create", "text": "the disk is on fire"}


async def failed_creation(fleet: Cluster, **fields: Any) -> str:
    container = name()
    with scripted(fleet, "node1", faults=[{**FAULT, "container": container}]):
        given = {"source": EMPTY, "node": "node1", **fields}
        operation = await fleet.operation("POST", f"/1.0/vz/{container}", given)
    assert (operation["status"], operation["status_code"]) == ("Failure", 400)
    assert operation["err"] == "the disk is on fire" and operation["err_code"] == "driver-failed"
    return container


async def test_a_failed_creation_stays_as_error_until_it_is_deleted(fleet: Cluster) -> None:
    container = await failed_creation(fleet)
    status = (await fleet.show(container))["status"]
    assert (status["status"], status["status_code"]) == ("Error", 112)
    assert "the disk is on fire" in status["reason"]
    assert None in status["machine"][0].values()
    for method, path, body in (
        ("PUT", "/state", {"action": "start"}),
        ("PUT", "", {"config": {}}),
        ("POST", "/snapshots", {}),
        ("POST", "", {"hostname": "x"}),
    ):
        await fleet.refused(method, f"/1.0/vz/{container}{path}", body, 409)
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    await fleet.refused("GET", f"/1.0/vz/{container}", None, 404)


async def test_a_new_post_replaces_a_failed_creation(fleet: Cluster) -> None:
    container = await failed_creation(fleet, hostname="first", config={"user.a": "1"})
    await fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY, "hostname": "second"})
    shown = await fleet.show(container)
    assert (shown["hostname"], shown["config"], shown["status"]["status"]) == ("second", {}, "Stopped")
    assert "reason" not in shown["status"]


async def test_a_failed_start_after_creation_undoes_the_creation(fleet: Cluster) -> None:
    container = name()
    with scripted(fleet, "node1", faults=[{"command": "container.start", "container": container}]):
        given = {"source": EMPTY, "node": "node1", "start": True}
        operation = await fleet.operation("POST", f"/1.0/vz/{container}", given)
    assert operation["status"] == "Failure"
    assert effects(fleet, container, "node1") == ["container.create", "container.delete"]
    assert (await fleet.show(container))["status"]["status"] == "Error"


# ---------------------------------------------------------------- DELETE


async def test_a_running_container_is_deleted_by_force_only(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    async with nothing_happens(fleet):
        for force in ("", "?force=0", "?force=false"):
            answer = await fleet.refused("DELETE", f"/1.0/vz/{container}{force}", None, 400)
            assert answer["metadata"]["field"] == "force" and "running" in answer["error"]
        await fleet.refused("DELETE", f"/1.0/vz/{container}?force=yes", None, 400)
    await fleet.done("DELETE", f"/1.0/vz/{container}?force=1")
    await fleet.refused("GET", f"/1.0/vz/{container}", None, 404)
    assert effects(fleet, container)[-1] == "container.delete"


async def test_a_deletion_takes_the_documents_empty_body(fleet: Cluster) -> None:
    container = await make(fleet)
    await fleet.done("DELETE", f"/1.0/vz/{container}", {})
    await fleet.refused("DELETE", f"/1.0/vz/{container}", {}, 404)


async def test_an_id_is_free_again_after_its_deletion(fleet: Cluster) -> None:
    container = await make(fleet, config={"user.a": "1"})
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    await fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY})
    assert (await fleet.show(container))["config"] == {}


# ---------------------------------------------------------------- placement


async def test_the_preview_of_placement_does_nothing(fleet: Cluster) -> None:
    async with nothing_happens(fleet):
        found = (await fleet.call("POST", "/1.0/placement", {"config": {"limits.memory": "1GB"}}))["metadata"]
        assert found["node"] in found["nodes"] and found["nodes"].keys() == {"node1", "node2"}
        pinned = (await fleet.call("POST", "/1.0/placement", {"node": "node2"}))["metadata"]
        assert pinned["node"] == "node2"
        nowhere = (await fleet.call("POST", "/1.0/placement", {"config": {"limits.cpus": "99"}}))["metadata"]
        assert nowhere["node"] is None and "99 are asked for" in nowhere["nodes"]["node1"]
        await fleet.refused("POST", "/1.0/placement", {"node": "no-such"}, 404)
