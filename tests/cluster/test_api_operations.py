"""Operations: their object, the list by status, filters, pages, wait, cancel."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.helpers.api import EMPTY, TIME, effects, make, name, scripted
from tests.helpers.cluster import Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
FIELDS = {
    "id",
    "class",
    "kind",
    "description",
    "created_at",
    "updated_at",
    "ended_at",
    "duration",
    "request",
    "status",
    "status_code",
    "resources",
    "metadata",
    "may_cancel",
    "err",
    "err_code",
    "location",
    "requestor",
}
UNKNOWN = "/1.0/operations/01234567-89ab-7def-8123-456789abcdef"


async def listed(fleet: Cluster, query: str = "") -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = (await fleet.call("GET", f"/1.0/operations{query}"))["metadata"]
    return found


async def test_an_operations_fields(fleet: Cluster) -> None:
    container = name()
    operation = await fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": "node1"})
    assert operation.keys() == FIELDS
    assert (operation["class"], operation["kind"]) == ("task", "container.create")
    assert (operation["status"], operation["status_code"], operation["err"]) == ("Success", 200, "")
    assert operation["location"] == "node1" and operation["may_cancel"] is False
    assert operation["requestor"] == {"username": "admin", "protocol": "tls", "address": "127.0.0.1"}
    assert all(TIME.fullmatch(operation[key]) for key in ("created_at", "updated_at", "ended_at"))
    assert (await fleet.call("GET", f"/1.0/operations/{operation['id']}"))["metadata"] == operation


async def test_the_list_is_by_status_newest_first(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    for _ in range(2):
        await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {}})
    with scripted(fleet, "node1", faults=[{"command": "container.start", "container": container}]):
        await fleet.operation("PUT", f"/1.0/vz/{container}/state", {"action": "start"})
    found = await listed(fleet, f"?container={container}&recursion=1")
    assert found.keys() == {"success", "failure"}
    assert [each["kind"] for each in found["success"]] == ["container.update", "container.update", "container.create"]
    assert [each["kind"] for each in found["failure"]] == ["container.start"]
    urls = await listed(fleet, f"?container={container}")
    assert urls == {status: [f"/1.0/operations/{each['id']}" for each in found[status]] for status in found}


async def test_filters(fleet: Cluster) -> None:
    one, other = await make(fleet, node="node1"), await make(fleet, node="node2")
    with scripted(fleet, "node1", delays={"container.start": 1.0}):
        answer = await fleet.call("PUT", f"/1.0/vz/{one}/state", {"action": "start"}, 202)
        running = await listed(fleet, "?status=running")
        assert answer["operation"] in running["running"] and running.keys() == {"running"}
        assert await listed(fleet, f"?container={one}&status=running") == {"running": [answer["operation"]]}
        assert await listed(fleet, f"?container={other}&status=running") == {}
        await fleet.call("GET", f"{answer['operation']}/wait")
    on_node2 = await listed(fleet, "?node=node2&recursion=1")
    assert {each["location"] for group in on_node2.values() for each in group} == {"node2"}
    assert await listed(fleet, f"?container={one}&node=node2") == {}
    assert await listed(fleet, "?container=nobody") == {}


async def test_pages(fleet: Cluster) -> None:
    container = await make(fleet)
    for _ in range(4):
        await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {}})
    [every] = (await listed(fleet, f"?container={container}")).values()
    found: list[str] = []
    cursor = ""
    for _ in range(4):
        response = await fleet.request("GET", f"/1.0/operations?container={container}&limit=2{cursor}")
        found += response.json()["metadata"].get("success", [])
        if "X-Next-Cursor" not in response.headers:
            break
        cursor = f"&cursor={response.headers['X-Next-Cursor']}"
    assert found == every and len(found) == 5


async def test_they_stay_when_their_container_is_gone(fleet: Cluster) -> None:
    container = await make(fleet)
    deleted = await fleet.done("DELETE", f"/1.0/vz/{container}")
    found = await listed(fleet, f"?container={container}")
    assert len(found["success"]) == 2 and found["success"][0].endswith(deleted["id"])


# ---------------------------------------------------------------- wait


async def test_wait_answers_at_the_end_and_with_a_timeout_before(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", delays={"container.start": 2.5}):
        answer = await fleet.call("PUT", f"/1.0/vz/{container}/state", {"action": "start"}, 202)
        url = f"{answer['operation']}/wait"
        at_once = (await fleet.call("GET", f"{url}?timeout=0"))["metadata"]
        assert (at_once["status"], at_once["status_code"], at_once["may_cancel"]) == ("Running", 103, True)
        began = time.monotonic()
        after_one = (await fleet.call("GET", f"{url}?timeout=1"))["metadata"]
        assert after_one["status"] == "Running" and time.monotonic() - began >= 0.9
        # Several may wait, and all hear of the end.
        ends = await asyncio.gather(*(fleet.call("GET", f"{url}?timeout={limit}") for limit in (-1, 20, 30)))
        assert [end["metadata"]["status"] for end in ends] == ["Success"] * 3
    again = await fleet.call("GET", url)
    assert again["type"] == "sync" and again["metadata"]["status_code"] == 200


async def test_wait_sends_its_headers_at_once(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", delays={"container.start": 0.7}):
        answer = await fleet.call("PUT", f"/1.0/vz/{container}/state", {"action": "start"}, 202)
        began = time.monotonic()
        async with fleet.client.stream("GET", f"{answer['operation']}/wait") as response:
            assert response.status_code == 200
            headers_after = time.monotonic() - began
            await response.aread()
            assert response.json()["metadata"]["status"] == "Success"
        assert headers_after < time.monotonic() - began - 0.1


async def test_a_failure_is_a_sync_answer_with_the_operation(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", faults=[{"command": "container.start", "container": container, "text": "no"}]):
        answer = await fleet.call("PUT", f"/1.0/vz/{container}/state", {"action": "start"}, 202)
        ended = await fleet.call("GET", f"{answer['operation']}/wait?timeout=20", code=200)
    assert ended["type"] == "sync"
    assert (ended["metadata"]["status"], ended["metadata"]["status_code"]) == ("Failure", 400)
    assert (ended["metadata"]["err"], ended["metadata"]["err_code"]) == ("no", "driver-failed")


async def test_who_stops_waiting_disturbs_nobody(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", delays={"container.start": 0.6}):
        answer = await fleet.call("PUT", f"/1.0/vz/{container}/state", {"action": "start"}, 202)
        waiting = asyncio.ensure_future(fleet.call("GET", f"{answer['operation']}/wait"))
        await asyncio.sleep(0.2)
        waiting.cancel()
        ended = await fleet.call("GET", f"{answer['operation']}/wait")
    assert ended["metadata"]["status"] == "Success"


# ---------------------------------------------------------------- cancel


async def test_a_cancelled_creation_is_undone(fleet: Cluster) -> None:
    container = name()
    with scripted(fleet, "node1", delays={"container.start": 20}):
        given = {"source": EMPTY, "node": "node1", "start": True}
        answer = await fleet.call("POST", f"/1.0/vz/{container}", given, 202)
        await until(lambda: effects(fleet, container, "node1") == ["container.create"], "it is created")
        began = time.monotonic()
        assert (await fleet.call("DELETE", answer["operation"]))["metadata"] == {}
        ended = (await fleet.call("GET", f"{answer['operation']}/wait?timeout=15"))["metadata"]
    assert (ended["status"], ended["status_code"], ended["err_code"]) == ("Cancelled", 401, "cancelled")
    assert time.monotonic() - began < 10
    assert effects(fleet, container, "node1") == ["container.create", "container.delete"]
    status = (await fleet.show(container))["status"]
    assert status["status"] == "Error" and "cancelled" in status["reason"]
    assert answer["operation"] in (await listed(fleet, f"?container={container}"))["cancelled"]


async def test_what_has_ended_or_never_was_cannot_be_cancelled(fleet: Cluster) -> None:
    operation = await fleet.done("POST", f"/1.0/vz/{name()}", {"source": EMPTY})
    answer = await fleet.refused("DELETE", f"/1.0/operations/{operation['id']}", None, 400)
    assert answer["metadata"]["field"] == "operation" and "ended" in answer["error"]
    for method, suffix in (("GET", ""), ("GET", "/wait"), ("DELETE", "")):
        await fleet.refused(method, UNKNOWN + suffix, None, 404)


async def test_a_deletion_that_has_begun_cannot_be_cancelled(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", delays={"container.delete": 1.0}):
        answer = await fleet.call("DELETE", f"/1.0/vz/{container}", None, 202)
        assert answer["metadata"]["may_cancel"] is False
        await fleet.refused("DELETE", answer["operation"], None, 400)
        ended = await fleet.call("GET", f"{answer['operation']}/wait")
    assert ended["metadata"]["status"] == "Success"
