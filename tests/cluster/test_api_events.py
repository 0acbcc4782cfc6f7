"""/1.0/events over a real websocket and TLS: what is told, to whom, and what is refused."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError

from controller import events as bus
from controller.api.events import Events as Handler
from controller.store import tokens
from tests.helpers.api import make, name, scripted
from tests.helpers.cluster import Cluster, until
from tests.helpers.listener import Listener, connect, ended, listening

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIFE = [
    "container-creating",
    "container-created",
    "container-started",
    "container-paused",
    "container-resumed",
    "container-restarted",
    "container-snapshot-created",
    "container-restored",
    "container-snapshot-deleted",
    "container-updated",
    "container-stopped",
    "container-renamed",
    "container-moved",
    "container-deleted",
]


async def live(fleet: Cluster) -> dict[str, Any]:
    """One of everything that can happen to a container; returns the last operation."""
    container, other = await make(fleet, start=True, node="node1"), name()
    state, snapshots = f"/1.0/vz/{container}/state", f"/1.0/vz/{container}/snapshots"
    for action in ("freeze", "unfreeze", "restart"):
        await fleet.done("PUT", state, {"action": action})
    await fleet.done("POST", snapshots, {"name": "s"})
    await fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "s"})
    await fleet.done("DELETE", f"{snapshots}/s")
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {"limits.memory": "64MB"}})
    await fleet.done("PUT", state, {"action": "stop", "force": True})
    await fleet.done("POST", f"/1.0/vz/{container}", {"name": other})
    await fleet.done("POST", f"/1.0/vz/{other}", {"node": "node2", "migration": True})
    return await fleet.done("DELETE", f"/1.0/vz/{other}")


async def test_a_life_is_told_in_order(fleet: Cluster) -> None:
    async with listening(fleet) as listener:
        operation = await live(fleet)
        last = await listener.until(ended(operation["id"]))
    assert listener.actions == LIFE
    first = listener.sequences[0]
    assert listener.sequences == list(range(first, first + len(listener.sequences)))
    # The last frame is the operation as GET shows it.
    assert last["metadata"] == (await fleet.call("GET", f"/1.0/operations/{operation['id']}"))["metadata"]
    assert (last["project"], last["location"]) == ("default", "node2") and last["timestamp"].endswith("Z")
    created = next(frame for frame in listener.frames if frame["type"] == "lifecycle")["metadata"]
    assert created.keys() == {"action", "source", "context", "requestor", "name", "project"}
    assert created["requestor"] == {"username": "admin", "protocol": "tls", "address": "127.0.0.1"}


async def test_an_operation_is_told_from_its_beginning_to_its_end(fleet: Cluster) -> None:
    async with listening(fleet, "?type=operation") as listener:
        container = await make(fleet)
        operation = await fleet.done("DELETE", f"/1.0/vz/{container}")
        await listener.until(ended(operation["id"]))
    told = [frame["metadata"] for frame in listener.frames]
    of_it = [view["status"] for view in told if view["id"] == operation["id"]]
    assert of_it == ["Running", "Success"] and {frame["type"] for frame in listener.frames} == {"operation"}
    assert all("parameters" not in view for view in told)


async def test_a_failure_is_told_with_its_reason(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    faults = [{"command": "container.update", "container": container, "when": "after"}]
    async with listening(fleet, f"?container={container}") as listener:
        other = await make(fleet)
        with scripted(fleet, "node1", faults=faults):
            operation = await fleet.operation("PUT", f"/1.0/vz/{container}", {"config": {"user.a": "2"}})
        view = (await listener.until(ended(operation["id"])))["metadata"]
    assert (view["status"], view["err"]) == ("Failure", "a scripted fault")
    assert listener.actions == []
    assert other not in str(listener.frames), "another container was not asked for"


async def test_history_says_who_asked_what_and_how_long_it_took(fleet: Cluster) -> None:
    container = name()
    response = await fleet.request("POST", f"/1.0/vz/{container}", {"source": {"type": "none"}})
    url = response.json()["operation"]
    assert response.json()["metadata"]["duration"] is None
    view = (await fleet.call("GET", f"{url}/wait"))["metadata"]
    assert view["request"] == response.headers["X-Request-Id"]
    assert view["requestor"] == {"username": "admin", "protocol": "tls", "address": "127.0.0.1"}
    assert 0 < view["duration"] < 30 and view["ended_at"] > view["created_at"]


async def test_no_commit_is_made_for_events(fleet: Cluster) -> None:
    container = await make(fleet)
    store = fleet.app.store
    before = store.commits
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "start"})
    assert store.commits - before == 2, "one that accepts, one that ends"


# ---------------------------------------------------------------- resuming


async def test_from_any_place_under_load_nothing_is_missing_or_told_twice(fleet: Cluster) -> None:
    async with listening(fleet) as whole:
        first = int(whole.connection.headers["X-Sequence"])
        load = [asyncio.ensure_future(live(fleet)) for _ in range(4)]
        pieces: list[list[int]] = []

        async def resume_again_and_again(chance: random.Random) -> None:
            position, found = first, list[int]()
            while not all(task.done() for task in load):
                async with listening(fleet, f"?since={position}") as listener:
                    for _ in range(chance.randrange(1, 15)):
                        frame = await listener.next()
                        assert frame is not None and frame["type"] != "resync"
                        position = frame.get("sequence", position)
                        if all(task.done() for task in load):
                            break
                found += listener.sequences
            pieces.append(found)

        readers = [asyncio.ensure_future(resume_again_and_again(random.Random(seed))) for seed in range(4)]
        for operation in await asyncio.gather(*load):
            await fleet.call("GET", f"/1.0/operations/{operation['id']}")
        # One more event, for a reader that waits for it.
        mark = await fleet.done("DELETE", f"/1.0/vz/{await make(fleet)}")
        await asyncio.gather(*readers)
        await whole.until(ended(mark["id"]))
    assert whole.sequences == list(range(first + 1, first + 1 + len(whole.sequences)))
    for found in pieces:
        assert found == list(range(first + 1, first + 1 + len(found))) and len(found) > 100


async def test_a_number_that_never_was_is_a_resync(fleet: Cluster) -> None:
    async with listening(fleet, f"?since={10**15}") as listener:
        frame = await listener.next()
        assert frame is not None and (frame["type"], frame["metadata"]["since"]) == ("resync", 10**15)
        container = await make(fleet)
        following = await listener.until(lambda frame: container in frame["metadata"].get("source", ""))
        assert following["sequence"] > frame["sequence"]


# ---------------------------------------------------------------- figures


async def test_figures_of_those_asked_for(fleet: Cluster) -> None:
    one, other = await make(fleet, start=True), await make(fleet, start=True)
    async with listening(fleet, f"?metrics={one}&type=metric") as listener:
        frames = [await listener.until(lambda frame: frame["metadata"]["state"]["memory"]["usage"]) for _ in range(3)]
    assert {frame["metadata"]["container"] for frame in listener.frames} == {one} and other not in str(frames)
    assert all(frame["type"] == "metric" and "sequence" not in frame for frame in listener.frames)
    times = [frame["metadata"]["state"]["sampled_at"] for frame in frames]
    assert times == sorted(set(times)), "each sample once"
    state = (await fleet.call("GET", f"/1.0/vz/{one}/state"))["metadata"]
    assert frames[-1]["metadata"]["state"].keys() == state.keys()
    async with listening(fleet, "?metrics=*") as every:
        await every.until(lambda frame: frame["metadata"].get("container") == other)


# ---------------------------------------------------------------- who may, and what is refused


async def refused(fleet: Cluster, query: str = "", token: str | None = None, **headers: str) -> int:
    with pytest.raises(HTTPClientError) as caught:
        await connect(fleet, query, token, **headers)
    return caught.value.code


async def test_a_viewer_may_listen_and_a_stranger_may_not(fleet: Cluster) -> None:
    viewer = await fleet.make_token(name("viewer"), "viewer")
    async with listening(fleet, token=viewer) as listener:
        container = await make(fleet)
        await listener.until(lambda frame: frame["metadata"].get("source") == f"/1.0/vz/{container}")
    assert await refused(fleet, token="wrong") == 401


async def test_another_sites_pages_may_not_listen(fleet: Cluster) -> None:
    assert await refused(fleet, Origin="https://evil.example") == 403
    assert await refused(fleet, Origin="null") == 403
    # As pylxd's websocket client says where it comes from, and as a page of the controller's does.
    for scheme in ("wss", "https"):
        async with listening(fleet, Origin=f"{scheme}://127.0.0.1:{fleet.settings.port}"):
            pass


@pytest.mark.parametrize(
    "query",
    ["?type=magic", "?since=-1", "?since=x", "?container=a%2Fb", "?metrics=a%2Fb", "?metrics=*,a", "?colour=red"],
)
async def test_what_makes_no_sense_is_refused_before_the_upgrade(fleet: Cluster, query: str) -> None:
    assert await refused(fleet, query) == 400


@pytest.mark.parametrize(
    "query", ["?project=default&all-projects=true", "?type=logging", "?type=lifecycle%2Coperation"]
)
async def test_what_lxds_clients_send_is_understood(fleet: Cluster, query: str) -> None:
    async with listening(fleet, query):
        pass


async def test_without_an_upgrade_it_says_what_it_is(fleet: Cluster) -> None:
    answer = await fleet.refused("GET", "/1.0/events", None, 400)
    assert answer["metadata"] == {"code": "invalid", "field": "Upgrade", "allowed": "websocket"}


async def test_a_limit_of_clients(fleet: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "MAX_SUBSCRIBERS", 2)
    async with listening(fleet), listening(fleet):
        assert await refused(fleet) == 503
    await until(lambda: not fleet.app.events.subscriptions, "both have left")
    async with listening(fleet):
        pass


async def test_a_token_that_is_revoked_ends_it(fleet: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "ping_interval", 0.1)
    monkeypatch.setattr(Handler, "ping_timeout", 0.1)
    token = await fleet.make_token(name("viewer"), "viewer")
    listener = await connect(fleet, token=token)
    record = await fleet.app.identities.find(token)
    assert record is not None
    await fleet.app.store.write(lambda transaction: tokens.rows.delete(transaction, record.id))
    await listener.to_end()
    assert listener.connection.close_code == 1008


async def test_what_a_client_says_is_ignored_and_too_much_of_it_ends_it(fleet: Cluster) -> None:
    async with listening(fleet) as listener:
        await listener.connection.write_message("hello")
        container = await make(fleet)
        await listener.until(lambda frame: frame["metadata"].get("source") == f"/1.0/vz/{container}")
        await listener.connection.write_message("x" * 100_000)
        assert await listener.to_end() is not None


# ---------------------------------------------------------------- many


async def test_a_hundred_listeners_hear_the_same(fleet: Cluster) -> None:
    listeners: list[Listener] = [await connect(fleet) for _ in range(100)]
    began, used = time.monotonic(), time.process_time()
    container = await make(fleet)
    operation = await fleet.done("DELETE", f"/1.0/vz/{container}")
    for listener in listeners:
        await listener.until(ended(operation["id"]))
    print(f"100 listeners: {time.monotonic() - began:.3f} s, {time.process_time() - used:.3f} s of CPU")
    assert all(listener.sequences == listeners[0].sequences for listener in listeners)
    for listener in listeners:
        await listener.close()
    await until(lambda: not fleet.app.events.subscriptions, "all have left")
