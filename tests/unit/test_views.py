"""What the API shows of a container in every situation, and what it does not know is null."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from common.clock import ManualClock, timestamp_of
from common.messages import Inventory, Samples
from common.reports import Address, ContainerReport, ContainerSample, Interface, NodeFacts, NodeSample
from common.states import NodeStatus, Status
from controller.api.views import container_view, node_view, rendered, state_view
from controller.fleet import Fleet
from controller.live import LiveContainer
from controller.records import Container, Node, Phase

GB = 10**9
FACTS = NodeFacts("host", "x86_64", 8, 16 * GB, 200 * GB, "fake", "1", "btrfs", "6.1", "v2", "1")
LOAD = NodeSample(memory_free=8 * GB, disk_free=100 * GB, cpu_load=0.5, load_average=(1.0, 2.0, 3.0), uptime=60.0)


def record(**fields: Any) -> Container:
    values: dict[str, Any] = {
        "id": "101",
        "node": "node1",
        "generation": 1,
        "hostname": "h",
        "description": "",
        "config": {},
        "image": None,
        "hwaddr": "00:16:3e:00:00:01",
        "created_at": "2024-01-01T00:00:00Z",
        "phase": Phase.READY,
    }
    return Container(**{**values, **fields})


def fleet_with(
    container: Container, *, status: Status | None = Status.RUNNING, facts: NodeFacts | None = FACTS
) -> Fleet:
    """A fleet with one node that is Online and one container there."""
    fleet = Fleet(ManualClock(now=datetime.fromtimestamp(1_700_000_000, UTC)))
    fleet.load([Node("node1", "key", "2024-01-01T00:00:00Z", facts)], [container], [], [])
    fleet.node_status("node1", NodeStatus.ONLINE, "")
    reports = (ContainerReport("101", container.generation, int(status)),) if status is not None else ()
    fleet.inventory("node1", Inventory(FACTS, reports, ()))
    return fleet


def sampled(fleet: Fleet, **figures: Any) -> LiveContainer:
    """The container after a sample with these figures."""
    fleet.samples("node1", Samples(1_700_000_000.0, LOAD, (ContainerSample("101", **figures),)))
    return fleet.containers["101"]


def machine(fleet: Fleet, live: LiveContainer) -> dict[str, Any]:
    [found] = container_view(fleet, live)["status"]["machine"]
    return dict(found)


def test_the_documents_example() -> None:
    fleet = fleet_with(record(config={"limits.cpus": "3"}))
    address = Address("inet", "10.1.2.3", "24", "global")
    live = sampled(
        fleet,
        disk_limit=5 * GB,
        disk_usage=3 * GB,
        memory_limit=4 * GB,
        memory_usage=3 * GB,
        memory_reclaimable=1 * GB,
        cpu_load=0.2,
        interfaces=(Interface("eth0", "00:16:3e:00:00:01", 1500, True, None, (address,), 1, 2, 3, 4),),
    )
    view = container_view(fleet, live)
    assert view["hostname"] == "h" and view["config"] == {"limits.cpus": "3"}
    assert (view["status"]["status"], view["status"]["status_code"]) == ("Running", 103)
    assert view["status"]["sampled_at"].startswith("2023-11-14T22:13:20")
    assert view["status"]["machine"] == [
        {
            "disk_space": "5GB",
            "disk_usage": "3GB",
            "memory": "4GB",
            "free_memory": "2GB",
            "cpu_load": "20%",
            "ip_address": "10.1.2.3",
        }
    ]


def test_nothing_is_made_up() -> None:
    fleet = fleet_with(record(), facts=None)
    live = fleet.containers["101"]
    # The inventory brought no facts into the row: even the node's size is not known.
    assert set(machine(fleet, live).values()) == {None}
    state = state_view(fleet, live)
    assert state["disk"] == {"root": {"usage": None, "total": None}} and state["sampled_at"] is None
    assert set(state["memory"].values()) == {None} and state["cpu"] == {"usage": None, "load": None}
    assert state["network"] == {} and state["pid"] is state["processes"] is state["started_at"] is None


@pytest.mark.parametrize(
    ("config", "figures", "space", "memory"),
    [
        ({}, {}, "200GB", "16GB"),
        ({"limits.memory": "256MB", "limits.disk": "5GB"}, {}, "5GB", "256MB"),
        ({"limits.memory": "25%"}, {}, "200GB", "4GB"),
        ({"limits.memory": "256MiB"}, {}, "200GB", "268.44MB"),
        # What the node measured counts more than what was asked for.
        ({"limits.memory": "256MB"}, {"memory_limit": 128_000_000, "disk_limit": GB}, "1GB", "128MB"),
    ],
)
def test_limits_else_the_nodes_size(config: dict[str, str], figures: dict[str, int], space: str, memory: str) -> None:
    fleet = fleet_with(record(config=config))
    shown = machine(fleet, sampled(fleet, **figures))
    assert (shown["disk_space"], shown["memory"]) == (space, memory)


@pytest.mark.parametrize(
    ("figures", "free"),
    [
        ({"memory_limit": 1000, "memory_usage": 600, "memory_reclaimable": 100}, "500B"),
        ({"memory_limit": 1000, "memory_usage": 600}, "400B"),
        ({"memory_limit": 1000, "memory_usage": 600, "memory_reclaimable": 900}, "1kB"),
        ({"memory_limit": 1000, "memory_usage": 1600}, "0B"),
        ({"memory_limit": 1000}, None),
    ],
)
def test_free_memory_is_the_limit_less_what_cannot_be_reclaimed(figures: dict[str, int], free: str | None) -> None:
    fleet = fleet_with(record())
    assert machine(fleet, sampled(fleet, **figures))["free_memory"] == free


@pytest.mark.parametrize(
    ("load", "text"), [(0.0, "0%"), (0.12345, "12.35%"), (1.0, "100%"), (0.5, "50%"), (None, None)]
)
def test_cpu_load(load: float | None, text: str | None) -> None:
    fleet = fleet_with(record())
    assert machine(fleet, sampled(fleet, cpu_load=load))["cpu_load"] == text


def test_the_address_is_the_first_global_one_ipv4_before_ipv6() -> None:
    def interface(name: str, *addresses: Address) -> Interface:
        return Interface(name, "00:16:3e:00:00:01", 1500, True, None, addresses, 0, 0, 0, 0)

    loopback = interface("lo", Address("inet", "127.0.0.1", "8", "local"))
    link, six = Address("inet6", "fe80::1", "64", "link"), Address("inet6", "2001:db8::1", "64", "global")
    four, later = Address("inet", "10.0.0.1", "24", "global"), Address("inet", "10.0.0.2", "24", "global")
    fleet = fleet_with(record())
    for interfaces, expected in (
        ((loopback, interface("eth0", link)), None),
        ((loopback, interface("eth0", link, six)), "2001:db8::1"),
        ((interface("eth0", six, four), interface("eth1", later)), "10.0.0.1"),
        ((interface("eth0", six), interface("eth1", later)), "10.0.0.2"),
    ):
        fleet = fleet_with(record())
        assert machine(fleet, sampled(fleet, interfaces=interfaces))["ip_address"] == expected


@pytest.mark.parametrize(
    ("phase", "reported", "node", "status", "last"),
    [
        (Phase.CREATING, None, NodeStatus.ONLINE, Status.PENDING, None),
        (Phase.FAILED, None, NodeStatus.ONLINE, Status.ERROR, None),
        (Phase.READY, Status.FROZEN, NodeStatus.ONLINE, Status.FROZEN, None),
        (Phase.READY, Status.RUNNING, NodeStatus.SUSPECT, Status.RUNNING, None),
        (Phase.READY, Status.RUNNING, NodeStatus.OFFLINE, Status.ERROR, "Running"),
        (Phase.READY, None, NodeStatus.OFFLINE, Status.ERROR, None),
        (Phase.READY, None, NodeStatus.ONLINE, Status.ERROR, None),
    ],
)
def test_the_status_in_every_situation(
    phase: Phase, reported: Status | None, node: NodeStatus, status: Status, last: str | None
) -> None:
    fleet = fleet_with(record(phase=phase, error="why" if phase is Phase.FAILED else None), status=reported)
    fleet.node_status("node1", node, "its heartbeats are missing")
    live = fleet.containers["101"]
    for shown in (container_view(fleet, live)["status"], state_view(fleet, live)):
        assert (shown["status"], shown["status_code"]) == (status.text, int(status))
        assert ("reason" in shown) == (status is Status.ERROR)
        assert shown.get("last_status") == last


def test_an_answer_is_rendered_once_for_every_change() -> None:
    fleet = fleet_with(record())
    live = sampled(fleet, cpu_load=0.1)
    first = rendered(fleet, live, "object")
    assert rendered(fleet, live, "object") is first
    assert b'"10%"' in first
    assert b'"20%"' in rendered(fleet, sampled(fleet, cpu_load=0.2), "object")
    fleet.node_status("node1", NodeStatus.OFFLINE, "gone")
    assert b'"Error"' in rendered(fleet, live, "object")


def test_a_nodes_capacity_and_load() -> None:
    fleet = fleet_with(record(reserved_memory=GB, reserved_disk=2 * GB))
    sampled(fleet)
    view = node_view(fleet, fleet.nodes["node1"])
    assert view["capacity"] == {
        "cpus": 8,
        "memory": 16 * GB,
        "disk": 200 * GB,
        "reserved_memory": GB,
        "reserved_disk": 2 * GB,
    }
    assert view["load"]["load_average"] == [1.0, 2.0, 3.0] and view["load"]["memory_free"] == 8 * GB
    assert (view["status"], view["containers"], view["unmanaged"]) == ("Online", 1, [])


def test_a_time_that_is_in_no_calendar_breaks_no_answer() -> None:
    for seconds in (1e300, -1e300, 1e15):
        assert timestamp_of(seconds) is None
        live = LiveContainer(record(), sample=ContainerSample("101", started_at=seconds), sampled_at=0.0)
        assert state_view(Fleet(ManualClock()), live)["started_at"] is None
