"""PUT and rename: the body that GET gave, read-only fields, ETag and If-Match, another hostname, another id."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.api import EMPTY, effects, make, name, nothing_happens, scripted
from tests.helpers.cluster import BUSYBOX, Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def etag_of(fleet: Cluster, container: str) -> str:
    response = await fleet.request("GET", f"/1.0/vz/{container}")
    return response.headers["ETag"]


# ---------------------------------------------------------------- PUT


@pytest.mark.parametrize("start", [False, True])
async def test_the_body_that_get_gave_is_accepted_unchanged(fleet: Cluster, start: bool) -> None:
    fields = {"source": BUSYBOX, "config": {"limits.cpus": "2", "user.a": "b"}, "description": "d"}
    container = await make(fleet, start=start, **fields)
    before = await fleet.show(container)
    await fleet.done("PUT", f"/1.0/vz/{container}", before)
    after = await fleet.show(container)
    assert {**after, "status": None} == {**before, "status": None}
    assert after["status"]["status"] == before["status"]["status"]


async def test_a_changed_body_changes_configuration_and_description(fleet: Cluster) -> None:
    container = await make(fleet, start=True, config={"user.old": "1", "limits.memory": "128MB"})
    body = await fleet.show(container)
    body["config"] = {"user.new": "2", "limits.memory": "512MB"}
    body["description"] = "changed"
    await fleet.done("PUT", f"/1.0/vz/{container}", body)
    shown = await fleet.show(container)
    assert shown["config"] == {"user.new": "2", "limits.memory": "512MB"} and shown["description"] == "changed"
    # The running container has it at once.
    assert shown["status"]["machine"][0]["memory"] == "512MB" and shown["status"]["status"] == "Running"


async def test_what_put_leaves_out_of_the_configuration_is_gone_and_the_description_stays(fleet: Cluster) -> None:
    container = await make(fleet, config={"user.a": "1"}, description="stays")
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {}})
    shown = await fleet.show(container)
    assert shown["config"] == {} and shown["description"] == "stays"


async def test_a_running_container_does_not_become_privileged(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    change = {"config": {"security.privileged": "true"}}
    error = await fleet.refused("PUT", f"/1.0/vz/{container}", change, 400)
    assert error["metadata"]["field"] == "config.security.privileged"
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "stop", "force": True})
    await fleet.done("PUT", f"/1.0/vz/{container}", change)
    assert (await fleet.show(container))["config"] == change["config"]


async def test_the_status_in_the_body_is_ignored(fleet: Cluster) -> None:
    container = await make(fleet)
    for status in ({"status": "Running"}, "Running", None, 5, []):
        await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {}, "status": status})
    assert (await fleet.show(container))["status"]["status"] == "Stopped"
    assert effects(fleet, container) == ["container.create"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("id", "x"), ("node", "node9"), ("node", None), ("created_at", "2020"), ("image", {"os": "x"}), ("image", None)],
)
async def test_a_read_only_field_that_differs_is_refused(fleet: Cluster, field: str, value: Any) -> None:
    container = await make(fleet, source=BUSYBOX)
    body = {**await fleet.show(container), field: value}
    async with nothing_happens(fleet):
        answer = await fleet.refused("PUT", f"/1.0/vz/{container}", body, 400)
    assert answer["metadata"]["field"] == field and answer["metadata"]["allowed"]


async def test_put_does_not_rename(fleet: Cluster) -> None:
    container = await make(fleet, hostname="one")
    async with nothing_happens(fleet):
        answer = await fleet.refused("PUT", f"/1.0/vz/{container}", {"config": {}, "hostname": "two"}, 400)
    assert answer["metadata"]["field"] == "hostname" and "POST" in answer["metadata"]["allowed"]


async def test_limits_that_its_node_cannot_hold_are_409(fleet: Cluster) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        for config in ({"limits.cpus": "9"}, {"limits.memory": "17GB"}, {"limits.disk": "201GB"}):
            answer = await fleet.refused("PUT", f"/1.0/vz/{container}", {"config": config}, 409)
            assert answer["metadata"]["code"] == "no-placement" and answer["metadata"]["nodes"]


async def test_a_change_that_fails_changes_nothing(fleet: Cluster) -> None:
    container = await make(fleet, node="node1", config={"user.a": "1"})
    before = await etag_of(fleet, container)
    with scripted(fleet, "node1", faults=[{"command": "container.update", "container": container, "when": "after"}]):
        operation = await fleet.operation("PUT", f"/1.0/vz/{container}", {"config": {"user.a": "2"}})
    assert operation["status"] == "Failure" and operation["err"] == "a scripted fault"
    assert (await fleet.show(container))["config"] == {"user.a": "1"} and await etag_of(fleet, container) == before


# ---------------------------------------------------------------- ETag


async def test_if_match_guards_a_change(fleet: Cluster) -> None:
    container = await make(fleet)
    old = await etag_of(fleet, container)
    assert old.startswith('"') and len(old) == 66
    body = {"config": {"user.a": "1"}}
    await fleet.done("PUT", f"/1.0/vz/{container}", body, headers={"If-Match": old})
    new = await etag_of(fleet, container)
    assert new != old
    async with nothing_happens(fleet):
        answer = await fleet.refused("PUT", f"/1.0/vz/{container}", {"config": {}}, 412, headers={"If-Match": old})
        assert answer["metadata"] == {"code": "precondition-failed", "field": "If-Match"}
    for tag in (new, new.strip('"'), f"W/{new}", f'"other", {new}', "*"):
        await fleet.done("PUT", f"/1.0/vz/{container}", body, headers={"If-Match": tag})
    await fleet.done("PUT", f"/1.0/vz/{container}", body)


async def test_if_match_guards_a_restore_too(fleet: Cluster) -> None:
    container = await make(fleet)
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"})
    await fleet.refused("PUT", f"/1.0/vz/{container}", {"restore": "a"}, 412, headers={"If-Match": '"x"'})
    tag = await etag_of(fleet, container)
    await fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "a"}, headers={"If-Match": tag})


@pytest.mark.parametrize("change", [{"config": {"user.a": "1"}}, {"config": {}, "description": "other"}])
async def test_whatever_can_be_written_changes_the_etag(fleet: Cluster, change: dict[str, Any]) -> None:
    container = await make(fleet)
    before = await etag_of(fleet, container)
    await fleet.done("PUT", f"/1.0/vz/{container}", change)
    assert await etag_of(fleet, container) != before


async def test_a_hostname_changes_the_etag(fleet: Cluster) -> None:
    container = await make(fleet)
    before = await etag_of(fleet, container)
    await fleet.done("POST", f"/1.0/vz/{container}", {"hostname": "other"})
    assert await etag_of(fleet, container) != before


async def test_what_changes_by_itself_leaves_the_etag_and_is_never_a_304(fleet: Cluster) -> None:
    container = await make(fleet)
    stopped = await fleet.request("GET", f"/1.0/vz/{container}")
    tag = stopped.headers["ETag"]
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "start"})
    for wanted in (tag, tag.strip('"'), f"W/{tag}", "*"):
        running = await fleet.request("GET", f"/1.0/vz/{container}", headers={"If-None-Match": wanted})
        assert running.status_code == 200 and running.headers["ETag"] == tag
        assert running.json()["metadata"]["status"]["status"] == "Running"


# ---------------------------------------------------------------- rename


@pytest.mark.parametrize("start", [False, True])
async def test_another_hostname(fleet: Cluster, start: bool) -> None:
    container = await make(fleet, start=start, hostname="one")
    operation = await fleet.done("POST", f"/1.0/vz/{container}", {"hostname": "two"})
    assert operation["resources"] == {"containers": [f"/1.0/vz/{container}"]}
    shown = await fleet.show(container)
    assert shown["hostname"] == "two" and shown["status"]["status"] == ("Running" if start else "Stopped")


async def test_another_id(fleet: Cluster) -> None:
    old, new = await make(fleet, hostname="h", config={"user.a": "1"}, description="d"), name()
    await fleet.done("POST", f"/1.0/vz/{old}/snapshots", {"name": "s"})
    before = await fleet.show(old)
    operation = await fleet.done("POST", f"/1.0/vz/{old}", {"name": new})
    assert set(operation["resources"]["containers"]) == {f"/1.0/vz/{old}", f"/1.0/vz/{new}"}
    await fleet.refused("GET", f"/1.0/vz/{old}", None, 404)
    after = await fleet.show(new)
    assert {**after, "status": 0} == {**before, "id": new, "status": 0} and after["status"]["status"] == "Stopped"
    assert (await fleet.call("GET", f"/1.0/vz/{new}/snapshots"))["metadata"] == [f"/1.0/vz/{new}/snapshots/s"]
    await fleet.done("POST", f"/1.0/vz/{old}", {"source": EMPTY})


async def test_an_id_that_a_younger_container_had(fleet: Cluster) -> None:
    old, other = await make(fleet, node="node1"), await make(fleet, node="node1")
    await fleet.done("DELETE", f"/1.0/vz/{other}")
    await fleet.done("POST", f"/1.0/vz/{old}", {"name": other})
    await fleet.done("PUT", f"/1.0/vz/{other}/state", {"action": "start"})
    assert (await fleet.show(other))["status"]["status"] == "Running"


async def test_another_id_and_hostname_at_once(fleet: Cluster) -> None:
    old, new = await make(fleet), name()
    await fleet.done("POST", f"/1.0/vz/{old}", {"name": new, "hostname": "both"})
    assert (await fleet.show(new))["hostname"] == "both"


async def test_a_running_container_keeps_its_id(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{container}", {"name": name()}, 400)
    assert answer["metadata"]["field"] and "stop it first" in answer["metadata"]["allowed"]


async def test_an_id_that_another_has_is_409(fleet: Cluster) -> None:
    one, other = await make(fleet), await make(fleet)
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{one}", {"name": other}, 409)
    assert answer["metadata"]["code"] == "conflict"


async def test_an_id_about_to_be_taken_is_409(fleet: Cluster) -> None:
    old, new = await make(fleet, node="node1"), name()
    with scripted(fleet, "node1", delays={"container.rename": 1.0}):
        answer = await fleet.call("POST", f"/1.0/vz/{old}", {"name": new}, 202)
        await fleet.refused("POST", f"/1.0/vz/{new}", {"source": EMPTY}, 409)
        await fleet.call("GET", f"{answer['operation']}/wait")
    assert (await fleet.show(new))["id"] == new


async def test_a_rename_that_fails_changes_nothing(fleet: Cluster) -> None:
    old, new = await make(fleet, node="node1"), name()
    with scripted(fleet, "node1", faults=[{"command": "container.rename", "container": old, "when": "after"}]):
        operation = await fleet.operation("POST", f"/1.0/vz/{old}", {"name": new})
    assert operation["status"] == "Failure"
    assert (await fleet.show(old))["status"]["status"] == "Stopped"
    await fleet.refused("GET", f"/1.0/vz/{new}", None, 404)
    await until(lambda: _claimed(fleet), "node1 has nothing that is not managed")


async def _claimed(fleet: Cluster) -> bool:
    return not (await fleet.call("GET", "/1.0/nodes/node1"))["metadata"]["unmanaged"]
