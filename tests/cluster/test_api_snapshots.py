"""Snapshots: list, create, show, restore, delete."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.helpers.api import TIME, effects, make, node_directory, nothing_happens, scripted
from tests.helpers.cluster import Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def snapshots(fleet: Cluster, container: str, query: str = "") -> list[Any]:
    found: list[Any] = (await fleet.call("GET", f"/1.0/vz/{container}/snapshots{query}"))["metadata"]
    return found


async def test_create_list_show_delete(fleet: Cluster) -> None:
    container = await make(fleet, config={"user.a": "1"})
    url = f"/1.0/vz/{container}/snapshots"
    assert await snapshots(fleet, container) == []
    operation = await fleet.done("POST", url, {"name": "before"})
    assert operation["resources"] == {"containers": [f"/1.0/vz/{container}"], "snapshots": [f"{url}/before"]}
    await fleet.done("POST", url, {"name": "after"})
    assert await snapshots(fleet, container) == [f"{url}/before", f"{url}/after"]
    shown = (await fleet.call("GET", f"{url}/before"))["metadata"]
    assert shown.keys() == {
        "name",
        "container",
        "created_at",
        "config",
        "expires_at",
        "scheduled",
        "stateful",
    }
    assert (shown["expires_at"], shown["scheduled"], shown["stateful"]) == (None, False, False)
    assert (shown["name"], shown["container"], shown["config"]) == ("before", container, {"user.a": "1"})
    assert TIME.fullmatch(shown["created_at"])
    assert await snapshots(fleet, container, "?recursion=1") == [
        shown,
        (await fleet.call("GET", f"{url}/after"))["metadata"],
    ]
    await fleet.done("DELETE", f"{url}/before")
    assert await snapshots(fleet, container) == [f"{url}/after"]
    await fleet.refused("GET", f"{url}/before", None, 404)
    await fleet.refused("DELETE", f"{url}/before", None, 404)


async def test_without_a_name_they_are_numbered(fleet: Cluster) -> None:
    container = await make(fleet)
    for _ in range(2):
        await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {})
    await fleet.done("DELETE", f"/1.0/vz/{container}/snapshots/snap0")
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {})
    names = sorted(url.rpartition("/")[2] for url in await snapshots(fleet, container))
    assert names == ["snap1", "snap2"], "no name is used again while a later one is there"


async def test_a_taken_name_is_409(fleet: Cluster) -> None:
    container = await make(fleet)
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"})
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"}, 409)
    assert answer["metadata"] == {"code": "conflict", "field": "name"}


async def test_a_failed_snapshot_is_not_listed(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    fault = {"command": "snapshot.create", "container": container, "when": "after"}
    with scripted(fleet, "node1", faults=[fault]):
        operation = await fleet.operation("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"})
    assert operation["status"] == "Failure" and await snapshots(fleet, container) == []
    assert effects(fleet, container) == ["container.create", "snapshot.create", "snapshot.delete"]


async def with_content(fleet: Cluster, container: str, content: str) -> None:
    """Change the container's files on its node, whose agent is restarted to see it."""
    node = (await fleet.show(container))["node"]
    await fleet.stop_agent(node)
    file = node_directory(fleet, node) / "world.json"
    world = json.loads(file.read_text())
    world["containers"][container]["content"] = content
    file.write_text(json.dumps(world))
    await fleet.start_agent(node)


def content(fleet: Cluster, container: str, node: str) -> str:
    world = json.loads((node_directory(fleet, node) / "world.json").read_text())
    return str(world["containers"][container]["content"])


@pytest.mark.parametrize("start", [False, True])
async def test_restore_puts_the_files_back(fleet: Cluster, start: bool) -> None:
    container = await make(fleet, node="node1", start=start)
    before = content(fleet, container, "node1")
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "good"})
    await with_content(fleet, container, "spoilt")
    status = (await fleet.show(container))["status"]["status"]
    await fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "good"})
    assert content(fleet, container, "node1") == before
    # It runs again if it ran before, and the snapshot stays. LXD's clients name it with the container.
    assert (await fleet.show(container))["status"]["status"] == status == ("Running" if start else "Stopped")
    assert await snapshots(fleet, container) == [f"/1.0/vz/{container}/snapshots/good"]
    await fleet.done("PUT", f"/1.0/vz/{container}", {"restore": f"{container}/good"})


async def test_they_go_with_their_container(fleet: Cluster) -> None:
    container = await make(fleet)
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"})
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    await fleet.done("POST", f"/1.0/vz/{container}", {"source": {"type": "none"}})
    assert await snapshots(fleet, container) == []


LATER = "2100-01-01T00:00:00.000000Z"


async def shown_of(fleet: Cluster, url: str) -> tuple[dict[str, Any], str]:
    """A snapshot, and its ETag."""
    response = await fleet.request("GET", url)
    return response.json()["metadata"], response.headers["ETag"]


@pytest.mark.parametrize(
    ("given", "expires"),
    [
        ({"expires_at": "2100-01-01T02:00:00+02:00"}, LATER),
        ({"expires_at": "0001-01-01T00:00:00Z", "stateful": False}, None),
        ({"expires_at": None}, "default"),
        ({}, "default"),
    ],
)
async def test_expiry(fleet: Cluster, given: dict[str, Any], expires: str | None) -> None:
    container = await make(fleet, config={"snapshots.expiry": "3d", "snapshots.pattern": "auto%d"})
    url = f"/1.0/vz/{container}/snapshots"
    await fleet.done("POST", url, given)
    shown, _ = await shown_of(fleet, f"{url}/auto0")
    if expires == "default":
        made, ends = (datetime.fromisoformat(shown[key]) for key in ("created_at", "expires_at"))
        assert timedelta(days=3) <= ends - made + timedelta(seconds=5) < timedelta(days=3, seconds=10)
    else:
        assert shown["expires_at"] == expires


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": "2100-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-10:00"}, "expires_at"),
        ({"stateful": True}, "stateful"),
        *[({"name": name}, "name") for name in ("", "a/b", "a b", "a*", "a\\b", "..", "x" * 65)],
    ],
)
async def test_what_is_refused(fleet: Cluster, given: dict[str, Any], field: str) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{container}/snapshots", given, 400)
    assert answer["metadata"]["field"] == field and answer["metadata"]["allowed"]


async def test_its_expiry_is_changed_with_if_match(fleet: Cluster) -> None:
    container = await make(fleet)
    url = f"/1.0/vz/{container}/snapshots/a"
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "a"})
    before, tag = await shown_of(fleet, url)
    operation = await fleet.done("PUT", url, {**before, "expires_at": LATER}, headers={"If-Match": tag})
    assert (operation["kind"], operation["resources"]["snapshots"]) == ("snapshot.update", [url])
    after, changed = await shown_of(fleet, url)
    assert after == {**before, "expires_at": LATER} and changed != tag
    await fleet.refused("PUT", url, {"expires_at": None}, 412, headers={"If-Match": tag})
    await fleet.done("PATCH", url, {}, headers={"If-Match": changed.strip('"')})
    assert await shown_of(fleet, url) == (after, changed)
    await fleet.done("PATCH", url, {"expires_at": None})
    assert await shown_of(fleet, url) == (before, tag)
    answer = await fleet.refused("PUT", url, {**before, "name": "b"}, 400)
    assert answer["metadata"]["field"] == "name"
    await fleet.refused("PUT", f"{url}x", {"expires_at": None}, 404)
    await fleet.refused("PUT", url, {"expires_at": "2020-01-01T00:00:00Z"}, 400)
    assert effects(fleet, container) == ["container.create", "snapshot.create"]


async def test_it_gets_another_name(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    url = f"/1.0/vz/{container}/snapshots"
    for name in ("a", "other"):
        await fleet.done("POST", url, {"name": name})
    before, _ = await shown_of(fleet, f"{url}/a")
    operation = await fleet.done("POST", f"{url}/a", {"name": "b"})
    assert (operation["kind"], operation["resources"]["snapshots"]) == ("snapshot.rename", [f"{url}/b"])
    assert (await shown_of(fleet, f"{url}/b"))[0] == {**before, "name": "b"}
    await fleet.refused("GET", f"{url}/a", None, 404)
    await fleet.refused("POST", f"{url}/a", {"name": "c"}, 404)
    await fleet.refused("POST", f"{url}/b", {"name": "other"}, 409)
    await fleet.refused("POST", f"{url}/b", {"name": "a/b"}, 400)
    await fleet.refused("POST", f"{url}/b", {}, 400)
    assert (await fleet.show(container))["drift"] == []
    await fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "b"})
    assert await snapshots(fleet, container) == [f"{url}/b", f"{url}/other"]


async def test_a_rename_that_fails_leaves_the_old_name(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    url = f"/1.0/vz/{container}/snapshots"
    await fleet.done("POST", url, {"name": "a"})
    fault = {"command": "snapshot.rename", "container": container, "when": "after"}
    with scripted(fleet, "node1", faults=[fault]):
        operation = await fleet.operation("POST", f"{url}/a", {"name": "b"})
    assert operation["status"] == "Failure" and await snapshots(fleet, container) == [f"{url}/a"]
    assert effects(fleet, container)[-2:] == ["snapshot.rename", "snapshot.rename"]
    assert (await fleet.show(container))["drift"] == []


@pytest.mark.parametrize(
    "config",
    [
        {"snapshots.schedule": "* * * *"},
        {"snapshots.schedule": "0 0 30 2 *"},
        {"snapshots.schedule.stopped": "maybe"},
        {"snapshots.expiry": "1x"},
        {"snapshots.pattern": "{{ creation_date }}"},
    ],
)
async def test_wrong_rules_are_refused_everywhere(fleet: Cluster, config: dict[str, str]) -> None:
    container, (key,) = await make(fleet), config
    bodies = (
        ("PUT", f"/1.0/vz/{container}", {"config": config}),
        ("POST", f"/1.0/vz/{container}-new", {"source": {"type": "none"}, "config": config}),
        ("POST", f"/1.0/vz/{container}-copy", {"source": {"type": "copy", "source": container}, "config": config}),
    )
    async with nothing_happens(fleet):
        for method, path, body in bodies:
            answer = await fleet.refused(method, path, body, 400)
            assert answer["metadata"]["field"] == f"config.{key}" and answer["metadata"]["allowed"]


async def test_they_are_taken_and_go_by_themselves(fleet: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, by the controller's own clock, which is moved on."""
    container = await make(fleet, start=True, config={"snapshots.schedule": "* * * * *", "snapshots.expiry": "1M"})
    clock = fleet.app.schedules._clock
    now = clock.now
    url = f"/1.0/vz/{container}/snapshots"
    monkeypatch.setattr(clock, "now", lambda: now() + timedelta(minutes=1))
    await until(lambda: fleet.app.fleet.containers[container].snapshots, "one is taken")
    (taken,) = (await fleet.call("GET", f"{url}?recursion=1"))["metadata"]
    assert taken["scheduled"] and taken["expires_at"]
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {}})
    monkeypatch.setattr(clock, "now", lambda: now() + timedelta(minutes=4))
    await until(lambda: not fleet.app.fleet.containers[container].snapshots, "it has gone")
    ended = (await fleet.call("GET", f"/1.0/operations?recursion=1&container={container}"))["metadata"]["success"]
    by_schedule = [one for one in ended if one["requestor"]["username"] == "schedule"]
    assert sorted(one["kind"] for one in by_schedule) == ["snapshot.create", "snapshot.delete"]
