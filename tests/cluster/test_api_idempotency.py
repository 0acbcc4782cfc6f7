"""Idempotency-Key: the same write under one key happens once and is answered as it was first."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.api import EMPTY, effects, make, name, scripted
from tests.helpers.cluster import Cluster, cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def key() -> dict[str, Any]:
    return {"headers": {"Idempotency-Key": secrets.token_hex(8)}}


def replayed(answer: httpx.Response) -> bool:
    return answer.headers.get("Idempotent-Replayed") == "true"


async def test_the_same_write_gives_the_first_answer_again_and_happens_once(fleet: Cluster) -> None:
    container, once = name(), key()
    body = {"source": EMPTY, "node": "node1"}
    first = await fleet.request("POST", f"/1.0/vz/{container}", body, **once)
    assert first.status_code == 202 and not replayed(first)
    await fleet.call("GET", f"{first.headers['Location']}/wait")
    again = await fleet.request("POST", f"/1.0/vz/{container}", body, **once)
    assert (again.status_code, again.content, again.headers["Location"]) == (
        202,
        first.content,
        first.headers["Location"],
    )
    assert replayed(again)
    assert len(effects(fleet, container)) == 1


async def test_what_is_gone_since_is_still_answered_as_it_was(fleet: Cluster) -> None:
    container, once = await make(fleet), key()
    first = await fleet.request("DELETE", f"/1.0/vz/{container}", **once)
    await fleet.call("GET", f"{first.headers['Location']}/wait")
    again = await fleet.request("DELETE", f"/1.0/vz/{container}", **once)
    assert (again.status_code, again.content) == (202, first.content)
    assert (await fleet.request("DELETE", f"/1.0/vz/{container}")).status_code == 404


@pytest.mark.parametrize("changed", ["body", "path", "method"])
async def test_another_request_under_the_key_is_refused(fleet: Cluster, changed: str) -> None:
    container, other, once = await make(fleet), await make(fleet), key()
    await fleet.request("PUT", f"/1.0/vz/{container}", {"config": {"user.a": "1"}}, **once)
    method = "POST" if changed == "method" else "PUT"
    path = f"/1.0/vz/{other if changed == 'path' else container}"
    body = {"config": {"user.a": "2" if changed == "body" else "1"}}
    refused = await fleet.request(method, path, body, **once)
    assert refused.status_code == 409
    assert refused.json()["metadata"]["field"] == "Idempotency-Key"


async def test_twins_sent_at_once_are_one(fleet: Cluster) -> None:
    container, once = name(), key()
    body = {"source": EMPTY, "node": "node1"}
    with scripted(fleet, "node1", delays={"container.create": 0.2}):
        twins = [fleet.request("POST", f"/1.0/vz/{container}", body, **once) for _ in range(20)]
        answers = await asyncio.gather(*twins)
        await fleet.call("GET", f"{answers[0].headers['Location']}/wait")
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert sum(replayed(answer) for answer in answers) == 19
    assert len(effects(fleet, container)) == 1


async def test_a_refused_write_may_be_tried_again_under_its_key(fleet: Cluster) -> None:
    container, once = await make(fleet), key()
    body = {"source": EMPTY, "node": "node1"}
    assert (await fleet.request("POST", f"/1.0/vz/{container}", body, **once)).status_code == 409
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    assert (await fleet.request("POST", f"/1.0/vz/{container}", body, **once)).status_code == 202


@pytest.mark.parametrize("bad", ["", "a b", "x" * 256, "é"])
async def test_what_is_no_key_is_refused(fleet: Cluster, bad: str) -> None:
    refused = await fleet.request(
        "PUT", f"/1.0/vz/{await make(fleet)}", {"config": {}}, headers={"Idempotency-Key": bad.encode()}
    )
    assert (refused.status_code, refused.json()["metadata"]["field"]) == (400, "Idempotency-Key")


async def test_keys_are_each_callers_own(fleet: Cluster) -> None:
    once, container = key(), await make(fleet)
    other = {"Authorization": f"Bearer {await fleet.make_token(name('op'), 'operator')}", **once["headers"]}
    await fleet.request("PUT", f"/1.0/vz/{container}", {"config": {"user.a": "1"}}, **once)
    await until(lambda: idle(fleet, container), "the first update ends")
    answer = await fleet.request("PUT", f"/1.0/vz/{container}", {"config": {"user.a": "2"}}, headers=other)
    assert answer.status_code == 202 and not replayed(answer)


async def idle(fleet: Cluster, container: str) -> bool:
    running = await fleet.call("GET", f"/1.0/operations?container={container}&status=running")
    return not running["metadata"]


async def test_a_secret_is_told_once_only(fleet: Cluster) -> None:
    once, node = key(), name("node")
    first = await fleet.request("POST", "/1.0/nodes", {"name": node}, **once)
    assert first.json()["metadata"]["token"]
    again = await fleet.request("POST", "/1.0/nodes", {"name": node}, **once)
    assert (again.status_code, again.json()["metadata"]["field"]) == (409, "Idempotency-Key")
    assert "not kept" in again.json()["error"]


async def test_an_upload_is_told_apart_by_its_content(fleet: Cluster) -> None:
    once = key()
    options = {"headers": {"Content-Type": "application/octet-stream", **once["headers"]}}
    first = await fleet.request("POST", "/1.0/images", content=b"no image", **options)
    again = await fleet.request("POST", "/1.0/images", content=b"no image", **options)
    other = await fleet.request("POST", "/1.0/images", content=b"another", **options)
    assert (first.status_code, again.content, other.status_code) == (202, first.content, 409)


async def test_answers_outlive_the_controller_and_are_forgotten_in_time(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=1, idempotency_lifetime=86400.0) as fleet:
        container, once = name(), key()
        body = {"source": EMPTY}
        first = await fleet.request("POST", f"/1.0/vz/{container}", body, **once)
        await fleet.stop_controller()
        await fleet.start_controller()
        again = await fleet.request("POST", f"/1.0/vz/{container}", body, **once)
        assert (again.status_code, again.content, replayed(again)) == (202, first.content, True)
        fleet.app.promises._lifetime = -1.0
        assert await fleet.app.promises.prune() == 1
        late = await fleet.request("POST", f"/1.0/vz/{container}", body, **once)
        assert late.status_code == 409 and "Idempotency" not in late.text
