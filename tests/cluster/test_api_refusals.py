"""Refusals come before the 202, name the field and what is allowed, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.helpers.api import EMPTY, make, name, nothing_happens
from tests.helpers.cluster import BUSYBOX, Cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")
JSON = {"Content-Type": "application/json"}
MIB = 1024 * 1024


def body(**fields: Any) -> dict[str, Any]:
    return {"source": EMPTY, **fields}


def source(**fields: Any) -> dict[str, Any]:
    return {"source": fields}


# What is wrong in the body of a creation: (body, code, the field that is named).
BAD_CREATIONS: list[tuple[Any, int, str]] = [
    (body(colour="red"), 400, "colour"),
    (body(status={}), 400, "status"),
    (body(id="other"), 400, "id"),
    (body(hostname=5), 400, "hostname"),
    (body(hostname=["a"]), 400, "hostname"),
    (body(hostname=""), 400, "hostname"),
    (body(hostname="a" * 65), 400, "hostname"),
    (body(hostname="a b"), 400, "hostname"),
    (body(hostname="a/b"), 400, "hostname"),
    (body(hostname="a:b"), 400, "hostname"),
    (body(hostname="a,b"), 400, "hostname"),
    (body(hostname="a\nb"), 400, "hostname"),
    (body(hostname="a\u2028b"), 400, "hostname"),
    (body(hostname="ä"), 400, "hostname"),
    (body(description=1.5), 400, "description"),
    (body(description="a\nb"), 400, "description"),
    (body(description="a" * 1025), 400, "description"),
    (body(node=1), 400, "node"),
    (body(node="nowhere"), 404, "node"),
    (body(start="yes"), 400, "start"),
    (body(start=1), 400, "start"),
    (body(config=[]), 400, "config"),
    (body(config="limits.cpus=2"), 400, "config"),
    (body(config={"limits.cpus": 2}), 400, "config.limits.cpus"),
    (body(config={"user.a": "b", "limits.memory": None}), 400, "config.limits.memory"),
    (body(config={"limits.cpus": {"a": "b"}}), 400, "config.limits.cpus"),
    (body(config={"limits.cpus": "0"}), 400, "config.limits.cpus"),
    (body(config={"limits.cpus": "-1"}), 400, "config.limits.cpus"),
    (body(config={"limits.cpus": "1.5"}), 400, "config.limits.cpus"),
    (body(config={"limits.cpus": "5000"}), 400, "config.limits.cpus"),
    (body(config={"limits.cpus": "2", "limits.cpu": "3"}), 400, "config.limits.cpu"),
    (body(config={"limits.cpu.allowance": "0%"}), 400, "config.limits.cpu.allowance"),
    (body(config={"limits.cpu.allowance": "101%"}), 400, "config.limits.cpu.allowance"),
    (body(config={"limits.cpu.allowance": "0ms/100ms"}), 400, "config.limits.cpu.allowance"),
    (body(config={"limits.memory": "1KiB"}), 400, "config.limits.memory"),
    (body(config={"limits.memory": "1 GB"}), 400, "config.limits.memory"),
    (body(config={"limits.memory": "1gb"}), 400, "config.limits.memory"),
    (body(config={"limits.memory": "0%"}), 400, "config.limits.memory"),
    (body(config={"limits.memory": "9999999999999GB"}), 400, "config.limits.memory"),
    (body(config={"limits.disk": "10%"}), 400, "config.limits.disk"),
    (body(config={"limits.disk": ""}), 400, "config.limits.disk"),
    (body(config={"limits.processes": "0"}), 400, "config.limits.processes"),
    (body(config={"boot.autostart": "maybe"}), 400, "config.boot.autostart"),
    (body(config={"boot.autostart.priority": "high"}), 400, "config.boot.autostart.priority"),
    (body(config={"environment.A-B": "1"}), 400, "config.environment.A-B"),
    (body(config={"environment.A": "1\nlxc.hook.pre-start = touch /x"}), 400, "config.environment.A"),
    (body(config={"user.a": "\x00"}), 400, "config.user.a"),
    (body(config={"user.a": "x" * 4097}), 400, "config.user.a"),
    (body(config={"user.": "x"}), 400, "config.user."),
    (body(config={"user.*": "x"}), 400, "config.user.*"),
    (body(config={"security.privileged": "2"}), 400, "config.security.privileged"),
    (body(config={"volatile.x": "1"}), 400, "config.volatile.x"),
    (body(config={"raw.lxc": "1"}), 400, "config.raw.lxc"),
    (body(config={"limits.colour": "1"}), 400, "config.limits.colour"),
    (body(config={f"user.{number}": "x" for number in range(513)}), 400, "config"),
    (body(config={f"user.{number}": "x" * 4000 for number in range(20)}), 400, "config"),
    (source(), 400, "source.type"),
    ({"source": None}, 400, "source"),
    ({"source": "image"}, 400, "source"),
    (source(type="magic"), 400, "source.type"),
    (source(type=1), 400, "source.type"),
    (source(type="none", alias="x"), 400, "source.alias"),
    (source(type="image"), 400, "source"),
    (source(type="image", properties={"os": "busybox"}, alias="x"), 400, "source"),
    (source(type="image", properties={}), 400, "source.properties"),
    (source(type="image", properties=[]), 400, "source.properties"),
    (source(type="image", properties={"os": 7}), 400, "source.properties.os"),
    (source(type="image", properties={"os": "x" * 129}), 400, "source.properties.os"),
    (source(type="image", properties={"os": "plan9"}), 404, "source.properties.os"),
    (source(type="image", properties={"os": "busybox", "flavour": "x"}), 400, "source.properties.flavour"),
    (source(type="image", properties={"os": "busybox", "release": "0.1"}), 400, "source.properties.release"),
    (source(type="image", properties={"os": "busybox", "architecture": "x"}), 400, "source.properties.architecture"),
    (source(type="image", alias="no-such"), 404, "source.alias"),
    (source(type="image", fingerprint="0123456789ab"), 404, "source.fingerprint"),
    (source(type="image", fingerprint="x" * 65), 400, "source.fingerprint"),
    (source(type="image", server="http://x", properties={"os": "busybox"}), 400, "source.server"),
    (source(type="copy"), 400, "source.source"),
    (source(type="copy", source="no-such"), 404, "source.source"),
    (source(type="copy", source="../etc"), 400, "source.source"),
    (source(type="migration"), 400, "source.source"),
    (source(type="migration", source="a/b"), 400, "source.source"),
]


def wrong(answer: dict[str, Any], code: int, field: str) -> None:
    """The error is whole, and names the field; a bad value comes with what is allowed."""
    metadata = answer["metadata"]
    assert metadata["field"] == field, answer
    assert metadata["code"] == {400: "invalid", 404: "not-found"}[code]
    if code == 400:
        assert metadata["allowed"], answer


@pytest.mark.parametrize(("given", "code", "field"), BAD_CREATIONS)
async def test_a_bad_creation(fleet: Cluster, given: Any, code: int, field: str) -> None:
    container = name()
    wrong(await fleet.refused("POST", f"/1.0/vz/{container}", given, code), code, field)
    await fleet.refused("GET", f"/1.0/vz/{container}", None, 404)


async def test_bad_creations_leave_nothing(fleet: Cluster) -> None:
    async with nothing_happens(fleet):
        for given, code, _ in BAD_CREATIONS:
            await fleet.refused("POST", f"/1.0/vz/{name()}", given, code)
            if "id" not in given:
                await fleet.refused("POST", "/1.0/vz", given, code)


@pytest.mark.parametrize("id", ["-a", ".a", "_a", "a" * 65, "a b", "a%0Ab", "ä", "a,b", "a:b", "%2e%2e"])
async def test_a_bad_id(fleet: Cluster, id: str) -> None:
    answer = await fleet.refused("POST", f"/1.0/vz/{id}", body(), 400)
    wrong(answer, 400, "id")
    assert "1-64" in answer["metadata"]["allowed"]


async def test_a_bad_id_in_the_body(fleet: Cluster) -> None:
    async with nothing_happens(fleet):
        for id in ("", "-a", "a/b", "a" * 65, 5, ["a"], {"a": 1}, True):
            wrong(await fleet.refused("POST", "/1.0/vz", body(id=id), 400), 400, "id")


MALFORMED = [
    b"{",
    b"}",
    b"nonsense",
    b"{'source': 1}",
    b'{"source": {"type": "none"},}',
    b'{"source": {"type": "none"}} {}',
    b'{"source": {"type": "none"}, "start": NaN}',
    b'{"source": {"type": "none"}, "start": Infinity}',
    b'{"source": {"type": "none"}, "hostname": "\xff"}',
    b'{"source": {"type": "none"}, "hostname": "\\ud800"}',
    b'{"source": {"type": "none"}, "hostname": "a\nb"}',
    b'{"source":' * 5000 + b"1" + b"}" * 5000,
    b"\xff\xfe{\x00}\x00",
    b"\x00",
]
NO_OBJECT = [b"null", b"5", b'"text"', b"[]", b"true", b"[" * 100_000]


@pytest.mark.parametrize("content", MALFORMED)
@pytest.mark.parametrize(("method", "path"), [("POST", "/1.0/vz/x"), ("POST", "/1.0/vz"), ("PUT", "/1.0/vz/x")])
async def test_malformed_json(fleet: Cluster, method: str, path: str, content: bytes) -> None:
    answer = await fleet.refused(method, path, None, 400, content=content, headers=JSON)
    wrong(answer, 400, answer["metadata"]["field"])
    # A wrong field that stands before the malformed part may be found first.
    assert answer["error"].startswith(("malformed JSON", "unknown field")), answer


@pytest.mark.parametrize("content", NO_OBJECT)
async def test_json_that_is_no_object(fleet: Cluster, content: bytes) -> None:
    for path in ("/1.0/vz/x", "/1.0/vz"):
        wrong(await fleet.refused("POST", path, None, 400, content=content, headers=JSON), 400, "body")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "json"]
)
async def test_a_body_of_another_type(fleet: Cluster, kind: str) -> None:
    content = json.dumps(body()).encode()
    answer = await fleet.refused("POST", "/1.0/vz/x", None, 400, content=content, headers={"Content-Type": kind})
    wrong(answer, 400, "Content-Type")
    assert answer["metadata"]["allowed"] == "application/json"


async def test_a_form_without_its_boundary_is_refused_with_the_reason(fleet: Cluster) -> None:
    kind = {"Content-Type": "multipart/form-data"}
    answer = await fleet.refused("POST", "/1.0/vz/x", None, 400, content=b"x", headers=kind)
    assert answer["metadata"] == {"code": "invalid"} and "multipart" in answer["error"]


async def test_json_with_a_charset_is_json(fleet: Cluster) -> None:
    container = name()
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    answer = await fleet.call("POST", f"/1.0/vz/{container}", None, 202, content=json.dumps(body()), headers=kind)
    await fleet.call("GET", f"{answer['operation']}/wait")


# ---------------------------------------------------------------- too large


@pytest.mark.parametrize("size", [MIB + 1, 5 * MIB])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/1.0/vz/x"), ("PUT", "/1.0/vz/x/state"), ("POST", "/1.0/nodes"), ("GET", "/1.0/vz")]
)
async def test_a_body_over_one_mebibyte_is_413(fleet: Cluster, method: str, path: str, size: int) -> None:
    answer = await fleet.refused(method, path, None, 413, content=b" " * size, headers=JSON)
    assert answer["metadata"] == {"code": "too-large", "field": "body", "allowed": f"at most {MIB} bytes"}


async def test_a_body_of_one_mebibyte_is_read(fleet: Cluster) -> None:
    answer = await fleet.refused("POST", "/1.0/vz/x", None, 400, content=b"{" + b" " * (MIB - 1), headers=JSON)
    assert answer["error"].startswith("malformed JSON")


async def test_a_large_body_in_pieces_without_a_length_is_413(fleet: Cluster) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    await fleet.refused("POST", "/1.0/vz/x", None, 413, content=pieces(), headers=JSON)


async def test_a_large_body_without_a_token_is_401(fleet: Cluster) -> None:
    headers = {**JSON, "Authorization": ""}
    await fleet.refused("POST", "/1.0/vz/x", None, 401, content=b" " * (2 * MIB), headers=headers)


async def test_an_announced_terabyte_is_answered_at_once(fleet: Cluster) -> None:
    context = ssl.create_default_context(cafile=str(fleet.settings.state / "tls" / "ca.crt"))
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.settings.port, ssl=context)
    head = (
        f"POST /1.0/vz/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {fleet.token}\r\nContent-Length: {10**12}\r\n\r\n"
    )
    writer.write(head.encode())
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ") and answer.count(b"HTTP/1.1") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error_code"] == 413


# ---------------------------------------------------------------- other bodies


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "config"),
        ({"config": None}, "config"),
        ({"config": {"limits.cpus": 2}}, "config.limits.cpus"),
        ({"config": {"limits.colour": "2"}}, "config.limits.colour"),
        ({"config": {}, "hostname": 5}, "hostname"),
        ({"config": {}, "hostname": "another"}, "hostname"),
        ({"config": {}, "id": "another"}, "id"),
        ({"config": {}, "node": "node9"}, "node"),
        ({"config": {}, "created_at": "2020-01-01T00:00:00Z"}, "created_at"),
        ({"config": {}, "image": {"os": "other"}}, "image"),
        ({"config": {}, "profiles": []}, "profiles"),
        ({"config": {}, "description": "a\nb"}, "description"),
        ({"restore": 5}, "restore"),
        ({"restore": "snap0", "config": {}}, "config"),
        ({"restore": "x" * 130}, "restore"),
    ],
)
async def test_a_bad_change(fleet: Cluster, given: Any, field: str) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        wrong(await fleet.refused("PUT", f"/1.0/vz/{container}", given, 400), 400, field)


async def test_restoring_an_unknown_snapshot(fleet: Cluster) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        wrong(await fleet.refused("PUT", f"/1.0/vz/{container}", {"restore": "no-such"}, 404), 404, "restore")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "source"),
        ({"hostname": "a b"}, "hostname"),
        ({"hostname": 5}, "hostname"),
        ({"name": "-a"}, "name"),
        ({"name": ["a"]}, "name"),
        ({"node": "node2"}, "migration"),
        ({"migration": True}, "source"),
        ({"migration": "yes", "node": "node2"}, "migration"),
        ({"live": True, "name": "a"}, "live"),
    ],
)
async def test_a_bad_rename(fleet: Cluster, given: Any, field: str) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        wrong(await fleet.refused("POST", f"/1.0/vz/{container}", given, 400), 400, field)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "action"),
        ({"action": "explode"}, "action"),
        ({"action": None}, "action"),
        ({"action": "start", "timeout": "1"}, "timeout"),
        ({"action": "start", "timeout": -2}, "timeout"),
        ({"action": "start", "timeout": 3601}, "timeout"),
        ({"action": "start", "force": 1}, "force"),
        ({"action": "start", "stateful": True}, "stateful"),
    ],
)
async def test_a_bad_action(fleet: Cluster, given: Any, field: str) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        wrong(await fleet.refused("PUT", f"/1.0/vz/{container}/state", given, 400), 400, field)


@pytest.mark.parametrize(
    ("path", "given", "field"),
    [
        ("/1.0/vz/{}/snapshots", {"name": "a/b"}, "name"),
        ("/1.0/vz/{}/snapshots", {"name": ".."}, "name"),
        ("/1.0/vz/{}/snapshots", {"name": 5}, "name"),
        ("/1.0/vz/{}/snapshots", {"stateful": True}, "stateful"),
        ("/1.0/placement", {"config": {"limits.cpus": "x"}}, "config.limits.cpus"),
        ("/1.0/placement", {"hostname": "a b"}, "hostname"),
        ("/1.0/placement", {"colour": "red"}, "colour"),
        ("/1.0/nodes", {"name": "Node"}, "name"),
        ("/1.0/nodes", {"name": 5}, "name"),
        ("/1.0/nodes", {"colour": "red"}, "colour"),
        ("/1.0/agents", {}, "secret"),
        ("/1.0/agents", {"secret": "x", "public_key": "short"}, "public_key"),
    ],
)
async def test_a_bad_body_elsewhere(fleet: Cluster, path: str, given: Any, field: str) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        wrong(await fleet.refused("POST", path.format(container), given, 400), 400, field)


@pytest.mark.parametrize(
    "query",
    [
        "/1.0/vz?limit=0",
        "/1.0/vz?limit=--5",
        "/1.0/vz?limit=1e3",
        "/1.0/vz?limit=99999999999999999999",
        "/1.0/vz?status=asleep",
        "/1.0/vz?cursor=-",
        "/1.0/vz?node=A_B",
        "/1.0/operations?limit=-1",
        "/1.0/operations?status=asleep",
        "/1.0/operations?cursor=zzz",
        "/1.0/operations?container=-",
        "/1.0/operations/01234567-89ab-7def-8123-456789abcdef/wait?timeout=-2",
        "/1.0/operations/01234567-89ab-7def-8123-456789abcdef/wait?timeout=0000000000000000000009999999999999999999",
        "/1.0/operations/01234567-89ab-7def-8123-456789abcdef/wait?timeout=soon",
    ],
)
async def test_a_bad_query(fleet: Cluster, query: str) -> None:
    parameter = query.partition("?")[2].partition("=")[0]
    wrong(await fleet.refused("GET", query, None, 400), 400, parameter)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/1.0/vz/{}"),
        ("PUT", "/1.0/vz/{}"),
        ("DELETE", "/1.0/vz/{}"),
        ("GET", "/1.0/vz/{}/state"),
        ("PUT", "/1.0/vz/{}/state"),
        ("GET", "/1.0/vz/{}/snapshots"),
        ("POST", "/1.0/vz/{}/snapshots"),
        ("GET", "/1.0/vz/{}/snapshots/a"),
        ("DELETE", "/1.0/vz/{}/snapshots/a"),
        ("GET", "/1.0/nodes/{}"),
        ("DELETE", "/1.0/nodes/{}"),
        ("GET", "/1.0/images/{}"),
        ("DELETE", "/1.0/images/{}"),
        ("GET", "/1.0/operations/{}"),
        ("GET", "/1.0/operations/{}/wait"),
        ("DELETE", "/1.0/operations/{}"),
        ("GET", "/1.0/vz?node={}"),
        ("GET", "/1.0/operations?node={}"),
    ],
)
async def test_what_does_not_exist_is_404(fleet: Cluster, method: str, path: str) -> None:
    given = {"PUT": {"action": "start"} if path.endswith("state") else {"config": {}}, "POST": {}}.get(method)
    async with nothing_happens(fleet):
        answer = await fleet.refused(method, path.format("no-such"), given, 404)
    assert answer["metadata"]["code"] == "not-found" and answer["metadata"]["field"]


async def test_an_architecture_that_nobody_can_build(fleet: Cluster) -> None:
    given = {"source": {"type": "image", "properties": {**BUSYBOX["properties"], "architecture": "riscv64"}}}
    async with nothing_happens(fleet):
        wrong(await fleet.refused("POST", f"/1.0/vz/{name()}", given, 400), 400, "source.properties.architecture")
