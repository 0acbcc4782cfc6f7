"""Envelopes, methods, paths, tokens and roles: what holds for every endpoint."""

from __future__ import annotations

import re
from typing import Any

import pytest

from controller.api.application import METHODS, ROUTES
from controller.api.identity import Right
from tests.helpers.api import EMPTY, ENVELOPE, OPERATION_URL, make, name
from tests.helpers.cluster import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

# One path for every route's pattern.
PATHS = {
    r"/": "/",
    r"/1\.0": "/1.0",
    r"/1\.0/ca": "/1.0/ca",
    r"/1\.0/vz": "/1.0/vz",
    r"/1\.0/vz/([^/]+)": "/1.0/vz/none",
    r"/1\.0/vz/([^/]+)/state": "/1.0/vz/none/state",
    r"/1\.0/vz/([^/]+)/snapshots": "/1.0/vz/none/snapshots",
    r"/1\.0/vz/([^/]+)/snapshots/([^/]+)": "/1.0/vz/none/snapshots/none",
    r"/1\.0/images": "/1.0/images",
    r"/1\.0/images/aliases": "/1.0/images/aliases",
    r"/1\.0/images/aliases/(.+)": "/1.0/images/aliases/none",
    r"/1\.0/images/([^/]+)/export": "/1.0/images/none/export",
    r"/1\.0/images/([^/]+)": "/1.0/images/none",
    r"/1\.0/images/([^/]+)/refresh": "/1.0/images/none/refresh",
    r"/1\.0/nodes": "/1.0/nodes",
    r"/1\.0/nodes/([^/]+)": "/1.0/nodes/none",
    r"/1\.0/nodes/([^/]+)/state": "/1.0/nodes/none/state",
    r"/1\.0/agents": "/1.0/agents",
    r"/1\.0/operations": "/1.0/operations",
    r"/1\.0/operations/([^/]+)": "/1.0/operations/none",
    r"/1\.0/operations/([^/]+)/wait": "/1.0/operations/none/wait",
    r"/1\.0/placement": "/1.0/placement",
    r"/1\.0/events": "/1.0/events",
    r"/1\.0/reconciliation": "/1.0/reconciliation",
    r"/1\.0/metadata/configuration": "/1.0/metadata/configuration",
    r"/1\.0/internal/images/([0-9a-f]{64})": "/1.0/internal/images/" + "0" * 64,
    r"/1\.0/internal/publications/([0-9a-f-]{36})": "/1.0/internal/publications/" + "0" * 36,
    r"/ui/([^/]*)": "/ui/index.html",
    r"/1\.0/internal/transfers/([0-9a-f-]{36})": "/1.0/internal/transfers/" + "0" * 36,
}
MATRIX = [
    (method, PATHS.get(pattern, ""), handler.rights.get(method)) for pattern, handler in ROUTES for method in METHODS
]
NEEDS_TOKEN = [row for row in MATRIX if row[2] is not Right.PUBLIC]


async def test_every_route_is_walked() -> None:
    assert {pattern for pattern, _ in ROUTES} == PATHS.keys()


async def test_sync_envelope(fleet: Cluster) -> None:
    response = await fleet.request("GET", "/1.0/vz")
    body = response.json()
    assert response.status_code == 200 and body.keys() == ENVELOPE
    head = {key: body[key] for key in ENVELOPE - {"metadata"}}
    assert head == {
        "type": "sync",
        "status": "success",
        "status_code": 200,
        "operation": "",
        "error_code": 0,
        "error": "",
    }
    assert response.headers["Content-Type"].startswith("application/json")
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_async_envelope(fleet: Cluster) -> None:
    container = name()
    response = await fleet.request("POST", f"/1.0/vz/{container}", {"source": EMPTY})
    body = response.json()
    assert response.status_code == 202 and body.keys() == ENVELOPE | {"resources"}
    assert (body["type"], body["status"], body["status_code"]) == ("async", "ok", 100)
    assert (body["error_code"], body["error"]) == (0, "")
    assert OPERATION_URL.fullmatch(body["operation"]) and response.headers["Location"] == body["operation"]
    assert body["resources"] == {"containers": [f"/1.0/vz/{container}"]}
    assert body["metadata"]["id"] == body["operation"].rpartition("/")[2]
    await fleet.call("GET", f"{body['operation']}/wait")


async def test_error_envelope(fleet: Cluster) -> None:
    response = await fleet.request("GET", "/1.0/vz/no-such")
    body = response.json()
    assert response.status_code == 404 and body.keys() == ENVELOPE
    assert (body["type"], body["status"], body["status_code"], body["operation"]) == ("error", "", 0, "")
    assert body["error_code"] == 404 and body["error"] == "container no-such not found"
    assert body["metadata"] == {"code": "not-found", "field": "id"}
    assert response.headers["X-Content-Type-Options"] == "nosniff" and response.headers["X-Request-Id"]


async def test_a_refusal_says_field_and_what_is_allowed(fleet: Cluster) -> None:
    answer = await fleet.refused("POST", f"/1.0/vz/{name()}", {"source": {"type": "magic"}}, 400)
    assert answer["metadata"] == {
        "code": "invalid",
        "field": "source.type",
        "allowed": "image, copy, migration, none, adopt",
    }


async def test_what_is_not_served_is_405_with_allow(fleet: Cluster) -> None:
    for method, path, right in MATRIX:
        if right is not None:
            continue
        response = await fleet.request(method, path)
        handler = next(handler for pattern, handler in ROUTES if re.fullmatch(pattern, path))
        assert response.status_code == 405, f"{method} {path}"
        assert response.headers["Allow"] == ", ".join(handler.rights)
        if method != "HEAD":
            assert response.json()["metadata"] == {"code": "method-not-allowed", "allowed": response.headers["Allow"]}


@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "Basic YWRtaW46YWRtaW4=", "Bearer"])
async def test_without_a_known_token_everything_is_401(fleet: Cluster, authorization: str) -> None:
    for method, path, _ in NEEDS_TOKEN:
        response = await fleet.request(method, path, {}, headers={"Authorization": authorization})
        assert response.status_code == 401, f"{method} {path}"
        assert response.headers["WWW-Authenticate"] == "Bearer"
        if method != "HEAD":
            assert response.json()["metadata"]["code"] == "unauthorized"


@pytest.mark.parametrize("path", ["/2.0", "/1.0/", "/1.0/vz/", "/1.0/vz/1/state/x", "/etc/passwd", "/1.0/containers"])
async def test_an_unknown_path_is_404_to_the_known_and_401_to_others(fleet: Cluster, path: str) -> None:
    assert (await fleet.refused("GET", path, None, 404))["metadata"]["field"] == "path"
    await fleet.refused("GET", path, None, 401, headers={"Authorization": ""})


@pytest.mark.parametrize("role", ["viewer", "operator", "admin"])
async def test_a_role_may_do_what_its_rights_say(fleet: Cluster, role: str) -> None:
    token = await fleet.make_token(name("token"), role)
    own = {"viewer": Right.READ, "operator": Right.OPERATE, "admin": Right.ADMIN}[role]
    headers = {"Authorization": f"Bearer {token}"}
    for method, path, right in NEEDS_TOKEN:
        if right is None or (role == "admin" and path == "/1.0/nodes"):
            continue
        response = await fleet.request(
            method, path, {"wrong": 1} if method in ("POST", "PUT") else None, headers=headers
        )
        forbidden = response.status_code == 403
        assert forbidden == (right > own), f"{role}: {method} {path} gave {response.status_code}"
        if forbidden:
            assert response.json()["metadata"] == {"code": "forbidden", "allowed": right.name.lower()}


async def test_anyone_gets_the_versions_and_the_reduced_server_object(fleet: Cluster) -> None:
    stranger = {"headers": {"Authorization": ""}}
    assert (await fleet.call("GET", "/", **stranger))["metadata"] == ["/1.0"]
    reduced = (await fleet.call("GET", "/1.0", **stranger))["metadata"]
    assert reduced.keys() == {"api_extensions", "api_status", "api_version", "auth", "auth_methods", "public"}
    assert (reduced["auth"], reduced["api_version"], reduced["public"]) == ("untrusted", "1.0", False)
    wrong = {"headers": {"Authorization": "Bearer wrong"}}
    assert (await fleet.call("GET", "/1.0", **wrong))["metadata"] == reduced
    authority = await fleet.request("GET", "/1.0/ca", **stranger)
    assert authority.text.startswith("-----BEGIN CERTIFICATE-----")


async def test_a_known_caller_gets_the_whole_server_object(fleet: Cluster) -> None:
    await make(fleet)
    whole: dict[str, Any] = (await fleet.call("GET", "/1.0"))["metadata"]
    assert whole["auth"] == "trusted" and whole["environment"]["server"] == "vzfleet"
    assert whole["environment"]["nodes"] == 2 and whole["environment"]["containers"] >= 1


async def test_an_unknown_query_parameter_is_refused(fleet: Cluster) -> None:
    answer = await fleet.refused("GET", "/1.0/vz?colour=red", None, 400)
    assert answer["metadata"]["field"] == "colour" and "hostname" in answer["metadata"]["allowed"]
    # LXD's clients send these with every call.
    await fleet.call("GET", "/1.0/vz?project=default&target=none")


@pytest.mark.parametrize("path", ["/1.0/vz?status=%ff", "/1.0/vz/%ff", "/1.0/vz/%00", "/1.0/vz/%2e%2e%2fx"])
async def test_strange_bytes_in_a_path_are_no_fault_of_ours(fleet: Cluster, path: str) -> None:
    response = await fleet.request("GET", path)
    assert response.status_code in (400, 404) and response.json()["metadata"]["code"] in ("invalid", "not-found")


async def test_the_configuration_keys_are_described(fleet: Cluster) -> None:
    keys = (await fleet.call("GET", "/1.0/metadata/configuration"))["metadata"]["configs"]["container"]
    assert {"limits.cpus", "limits.memory", "limits.disk", "boot.autostart", "user.*"} <= keys.keys()
    for facts in keys.values():
        assert facts.keys() == {"type", "default", "liveupdate", "shortdesc", "allowed"}
        assert facts["liveupdate"] in ("yes", "no") and facts["shortdesc"].endswith(".")
