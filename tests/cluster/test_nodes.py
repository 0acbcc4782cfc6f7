"""Nodes: list, show, join, remove; a node out of reach and what its containers show."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from agent import enrolment
from agent.config import AgentConfig
from common.clock import SystemClock
from common.errors import VzfleetError
from tests.helpers.api import EMPTY, TIME, make, name, nothing_happens
from tests.helpers.cluster import Cluster, cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
FIELDS = {"name", "status", "message", "capacity", "load", "containers", "unmanaged", "last_seen", "added_at"}
FIGURES = ("disk_space", "disk_usage", "memory", "free_memory", "cpu_load", "ip_address")


async def show_node(fleet: Cluster, node: str) -> dict[str, Any]:
    shown: dict[str, Any] = (await fleet.call("GET", f"/1.0/nodes/{node}"))["metadata"]
    return shown


async def test_list_and_show(fleet: Cluster) -> None:
    await make(fleet, node="node1", config={"limits.memory": "1GB", "limits.disk": "2GB"})
    urls = (await fleet.call("GET", "/1.0/nodes"))["metadata"]
    assert {"/1.0/nodes/node1", "/1.0/nodes/node2"} <= set(urls)
    node = await show_node(fleet, "node1")
    assert node.keys() >= FIELDS and node["status"] == "Online" and node["driver"].startswith("fake")
    capacity, load = node["capacity"], node["load"]
    assert (capacity["cpus"], capacity["memory"], capacity["disk"]) == (8, 16 * 10**9, 200 * 10**9)
    assert capacity["reserved_memory"] >= 10**9 and capacity["reserved_disk"] >= 2 * 10**9
    assert 0 < load["memory_free"] <= capacity["memory"] and 0 < load["disk_free"] <= capacity["disk"]
    assert len(load["load_average"]) == 3 and TIME.fullmatch(load["sampled_at"]) and load["uptime"] > 0
    assert node["containers"] >= 1 and node["unmanaged"] == []
    listed = (await fleet.call("GET", "/1.0/nodes?recursion=1"))["metadata"]
    assert {"node1", "node2"} <= {each["name"] for each in listed} and listed[0].keys() == node.keys()


async def test_join_serve_and_leave(fleet: Cluster) -> None:
    node = name("node")
    await fleet.add_node(node)
    container = name()
    await fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": node, "start": True})
    assert (await show_node(fleet, node))["containers"] == 1
    async with nothing_happens(fleet):
        answer = await fleet.refused("DELETE", f"/1.0/nodes/{node}", None, 409)
    assert "has containers" in answer["error"]
    await fleet.done("DELETE", f"/1.0/vz/{container}?force=1")
    await fleet.call("DELETE", f"/1.0/nodes/{node}")
    await fleet.refused("GET", f"/1.0/nodes/{node}", None, 404)
    await fleet.refused("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": node}, 404)
    await fleet.stop_agent(node)


async def test_a_join_token_is_good_once_and_for_its_name(fleet: Cluster, tmp_path: Path) -> None:
    node = name("node")
    answer = (await fleet.call("POST", "/1.0/nodes", {"name": node}))["metadata"]
    assert answer.keys() == {"token", "expires_at"} and TIME.fullmatch(answer["expires_at"])
    wrong = AgentConfig(state=tmp_path / "wrong", node=name("node"), driver="fake")
    with pytest.raises(VzfleetError):
        await enrolment.join(answer["token"], wrong, SystemClock())
    await enrolment.join(answer["token"], AgentConfig(state=tmp_path / "a", node=node, driver="fake"), SystemClock())
    second = AgentConfig(state=tmp_path / "b", node=node, driver="fake")
    with pytest.raises(VzfleetError):
        await enrolment.join(answer["token"], second, SystemClock())
    await fleet.refused("POST", "/1.0/nodes", {"name": node}, 409)
    assert (await show_node(fleet, node))["status"] == "Offline"
    await fleet.call("DELETE", f"/1.0/nodes/{node}")


async def test_a_token_without_a_name_takes_any(fleet: Cluster, tmp_path: Path) -> None:
    node = name("node")
    token = (await fleet.call("POST", "/1.0/nodes", {}))["metadata"]["token"]
    await enrolment.join(token, AgentConfig(state=tmp_path / "a", node=node, driver="fake"), SystemClock())
    assert (await show_node(fleet, node))["name"] == node
    await fleet.call("DELETE", f"/1.0/nodes/{node}")


async def test_a_wrong_secret_is_403(fleet: Cluster) -> None:
    body = {"secret": "wrong", "public_key": "a" * 40, "node": "intruder"}
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", "/1.0/agents", body, 403, headers={"Authorization": ""})
    assert answer["metadata"]["field"] == "secret"


async def test_a_node_out_of_reach(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=2, heartbeat_timeout=3.0) as fleet:
        running = await make(fleet, start=True, node="node1", config={"limits.memory": "256MB"})
        stopped = await make(fleet, node="node1")
        await make(fleet, node="node2")
        figures = (await fleet.show(running))["status"]
        left = time.monotonic()
        await fleet.stop_agent("node1")
        await fleet.wait_for_node("node1", "Offline")
        assert time.monotonic() - left < 10
        node = await show_node(fleet, "node1")
        assert node["message"] and TIME.fullmatch(node["last_seen"])
        await _shows_its_last_figures(fleet, running, "Running", figures)
        status = (await fleet.show(stopped))["status"]
        assert (status["status"], status["last_status"]) == ("Error", "Stopped")
        await _is_refused_or_placed_elsewhere(fleet, running)
        await fleet.start_agent("node1")
        await until(lambda: _is(fleet, running, "Running"), "it is as it was")
        assert "last_status" not in (await fleet.show(running))["status"]
        await fleet.done("PUT", f"/1.0/vz/{running}/state", {"action": "stop"})


async def _is(fleet: Cluster, container: str, status: str) -> bool:
    return bool((await fleet.show(container))["status"]["status"] == status)


async def _shows_its_last_figures(fleet: Cluster, container: str, last: str, before: dict[str, Any]) -> None:
    status = (await fleet.show(container))["status"]
    assert (status["status"], status["status_code"], status["last_status"]) == ("Error", 112, last)
    assert "node1 is out of reach" in status["reason"]
    assert status["machine"][0].keys() == set(FIGURES) and None not in status["machine"][0].values()
    assert status["machine"][0]["ip_address"] == before["machine"][0]["ip_address"]
    assert status["sampled_at"] >= before["sampled_at"]
    state = (await fleet.call("GET", f"/1.0/vz/{container}/state"))["metadata"]
    assert (state["status_code"], state["last_status"], state["reason"]) == (112, last, status["reason"])
    assert f"/1.0/vz/{container}" in (await fleet.call("GET", "/1.0/vz?status=error"))["metadata"]


async def _is_refused_or_placed_elsewhere(fleet: Cluster, container: str) -> None:
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", f"/1.0/vz/{name()}", {"source": EMPTY, "node": "node1"}, 503)
        assert answer["metadata"]["code"] == "unavailable" and "out of reach" in answer["error"]
        url = f"/1.0/vz/{container}"
        for method, path, body in (
            ("PUT", url, {"config": {}}),
            ("PUT", f"{url}/state", {"action": "stop"}),
            ("POST", f"{url}/snapshots", {}),
            ("POST", url, {"hostname": "x"}),
            ("DELETE", f"{url}?force=1", None),
            ("POST", url, {"migration": True, "node": "node2"}),
            ("POST", f"/1.0/vz/{name()}", {"source": {"type": "copy", "source": container}}),
        ):
            await fleet.refused(method, path, body, 503)
    operation = await fleet.done("POST", f"/1.0/vz/{name()}", {"source": EMPTY})
    assert operation["location"] == "node2" and "Offline" in operation["metadata"]["placement"]["node1"]
