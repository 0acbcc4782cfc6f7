"""Drift: a pure function of a row and a report; who is told of it, and when; what altered limits and files are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cgroups import Limits
from agent.cgroups.base import tightest
from agent.drivers.lxc import altered
from common.clock import ManualClock
from common.messages import Inventory, Outcome
from common.options import parse_config
from common.reports import ContainerReport, Difference, SnapshotReport
from common.states import NodeStatus, Status
from common.units import format_exactly, parse_size
from controller import deviations, drift
from controller.drift import MOST, Drift
from controller.fleet import Fleet
from controller.records import Change, Container, Node, Phase, Power
from controller.services.notices import Notices
from tests.helpers.core import FACTS

POWERS = {Power.RUNNING: Status.RUNNING, Power.STOPPED: Status.STOPPED, Power.FROZEN: Status.FROZEN}
CONFIG = {"limits.memory": "64MiB", "user.owner": "me"}


def row(**changes: Any) -> Container:
    fields: dict[str, Any] = {
        "id": "c",
        "node": "n1",
        "generation": 5,
        "hostname": "host",
        "description": "",
        "config": CONFIG,
        "image": None,
        "hwaddr": "",
        "created_at": "",
        "phase": Phase.READY,
        "power": Power.RUNNING,
    }
    return Container(**{**fields, **changes})


def report(**changes: Any) -> ContainerReport:
    fields: dict[str, Any] = {
        "id": "c",
        "generation": 5,
        "status": int(Status.RUNNING),
        "config": CONFIG,
        "hostname": "host",
    }
    return ContainerReport(**{**fields, **changes})


@given(st.sampled_from(Power), st.dictionaries(st.sampled_from(["limits.memory", "user.a"]), st.text("ab", min_size=1)))
def test_what_is_as_it_should_be_has_not_drifted(power: Power, config: dict[str, str]) -> None:
    config = {key: "64MiB" if key.startswith("limits") else value for key, value in config.items()}
    there = report(status=int(POWERS[power]), config=config)
    assert drift.find(row(power=power, config=config), there) == ()


@given(
    st.none() | st.sampled_from(Power),
    st.integers(0, 500),
    st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=4),
    st.lists(st.builds(Difference, st.text(max_size=9), st.none() | st.text(), st.none() | st.text()), max_size=9),
    st.sets(st.text("abc", min_size=1), max_size=3),
    st.booleans(),
)
def test_every_field_is_named_once_with_two_sides(
    power: Power | None,
    status: int,
    config: dict[str, str],
    changes: list[Difference],
    snapshots: set[str],
    bare: bool,
) -> None:
    there = report(status=status, config=config, altered=tuple(changes), bare=bare)
    found = drift.find(row(power=power), there, snapshots)
    assert len({one.field for one in found}) == len(found)
    assert {one.field for one in found if one.field.startswith("snapshots.")} == {f"snapshots.{s}" for s in snapshots}
    if bare:
        assert not any(one.field == "config.user.owner" for one in found if not changes)
    assert drift.find(row(power=power, operation="o"), there, snapshots) == ()
    assert drift.find(row(power=power, phase=Phase.FAILED), there, snapshots) == ()


@pytest.mark.parametrize(
    ("changes", "reported", "expected"),
    [
        ({}, {"status": int(Status.STOPPED)}, [Drift("status", "Running", "Stopped")]),
        ({}, {"status": 999}, [Drift("status", "Running", "Error")]),
        ({"power": None}, {"status": int(Status.STOPPED)}, []),
        ({"power": Power.STOPPED}, {}, [Drift("status", "Stopped", "Running")]),
        ({"power": Power.STOPPED, "config": {"boot.autostart": "1"}}, {"config": {"boot.autostart": "1"}}, []),
        ({"power": Power.FROZEN}, {}, [Drift("status", "Frozen", "Running")]),
        ({}, {"hostname": "other"}, [Drift("hostname", "host", "other")]),
        ({}, {"config": {"limits.memory": "64MiB"}}, [Drift("config.user.owner", "me", None)]),
        ({}, {"config": {}, "hostname": "", "bare": True}, []),
        (
            {},
            {"altered": (Difference("limits.memory", "64MiB", "1MiB"), Difference("lxc.uts.name", "host", "x"))},
            [Drift("config.limits.memory", "64MiB", "1MiB"), Drift("lxc.uts.name", "host", "x")],
        ),
        ({}, {"snapshots": (SnapshotReport("s", 0.0),)}, [Drift("snapshots.s", "absent", "present")]),
    ],
)
def test_what_differs(changes: dict[str, Any], reported: dict[str, Any], expected: list[Drift]) -> None:
    assert list(drift.find(row(**changes), report(**reported))) == expected


def test_what_an_agent_says_is_bounded() -> None:
    many = tuple(Difference(f"k{number}", None, "x") for number in range(10_000))
    assert len(drift.find(row(), report(altered=many))) == MOST
    snapshots = tuple(SnapshotReport(f"s{number}", 0.0) for number in range(10_000))
    assert len(drift.find(row(), report(snapshots=snapshots))) == MOST
    config = {f"user.k{number}": "x" for number in range(10_000)}
    assert len(drift.find(row(), report(config=config))) == MOST


def test_one_that_is_gone_or_runs_elsewhere() -> None:
    gone = Drift("existence", "present", "absent")
    assert drift.find(row(), None) == (gone,)
    assert drift.find(row(), None, elsewhere="n2") == (gone, Drift("node", "n1", "n2"))
    assert drift.find(row(), report(), elsewhere="n2") == (Drift("node", "n1", "n2"),)


# ---------------------------------------------------------------- in the fleet, and who is told


class Heard:
    """Stands for the bus of events."""

    def __init__(self) -> None:
        self.actions: list[tuple[str, str | None, str | None]] = []

    def note(self, action: str, source: str, *, container: str, node: str, details: dict[str, Any]) -> None:
        assert source == f"/1.0/vz/{container}" and details
        self.actions.append((action, container, node))


def make_fleet() -> Fleet:
    fleet = Fleet(ManualClock())
    fleet.load([Node(name, name * 20, "", FACTS) for name in ("n1", "n2")], [row()], [], [])
    for name in ("n1", "n2"):
        there = (report(),) if name == "n1" else ()
        fleet.inventory(name, Inventory(FACTS, there, ()))
        fleet.node_status(name, NodeStatus.ONLINE, "")
    return fleet


def found(fleet: Fleet) -> list[str]:
    return [one.field for one in deviations.drift_of(fleet, fleet.containers["c"])]


def test_nothing_is_told_of_a_node_out_of_reach_or_that_has_told_nothing() -> None:
    fleet = make_fleet()
    fleet.state_changed("n1", report(), removed=True)
    assert found(fleet) == ["existence"]
    fleet.node_status("n1", NodeStatus.OFFLINE, "")
    assert found(fleet) == []
    fleet.node_status("n1", NodeStatus.ONLINE, "")
    fleet.nodes["n1"].images = None
    fleet.node_status("n1", NodeStatus.ONLINE, "")
    assert found(fleet) == []


def test_an_older_generation_that_runs_elsewhere() -> None:
    fleet = make_fleet()
    fleet.state_changed("n2", report(generation=4), removed=False)
    assert found(fleet) == ["node"]
    fleet.state_changed("n2", report(generation=4, status=int(Status.STOPPED)), removed=False)
    assert found(fleet) == []
    fleet.state_changed("n2", report(generation=0), removed=False)
    assert found(fleet) == [], "one made by hand is another one"


def test_another_one_in_its_place() -> None:
    fleet = make_fleet()
    fleet.state_changed("n1", report(generation=6), removed=False)
    assert found(fleet) == ["existence"]
    assert [one.generation for one in deviations.unmanaged(fleet, fleet.nodes["n1"])] == [6]


async def look(notices: Notices) -> None:
    notices._look()


async def test_what_is_found_is_told_once_and_when_it_is_gone() -> None:
    fleet, heard = make_fleet(), Heard()
    fleet.watch = notices = Notices(fleet, heard)  # type: ignore[arg-type]
    for _ in range(2):
        fleet.state_changed("n1", report(status=int(Status.STOPPED)), removed=False)
        await look(notices)
    # A node out of reach, or an operation under way, clears nothing.
    fleet.node_status("n1", NodeStatus.OFFLINE, "")
    await look(notices)
    fleet.node_status("n1", NodeStatus.ONLINE, "")
    fleet.apply([Change(Container, "c", row(operation="o"))])
    await look(notices)
    fleet.apply([Change(Container, "c", row())])
    await look(notices)
    assert heard.actions == [("container-drifted", "c", "n1")]
    fleet.state_changed("n1", report(), removed=False)
    await look(notices)
    assert heard.actions[1:] == [("container-drift-cleared", "c", "n1")]
    notices.close()


async def test_containers_of_nobody_are_told_and_not_those_that_an_operation_makes() -> None:
    fleet, heard = make_fleet(), Heard()
    fleet.watch = notices = Notices(fleet, heard)  # type: ignore[arg-type]
    fleet.apply([Change(Container, "c", row(operation="move"))])
    fleet.outcome("n2", Outcome(container=report(generation=6)), None)
    await look(notices)
    fleet.apply([Change(Container, "c", row(node="n2", generation=6))])
    fleet.gone("n1", "c")
    await look(notices)
    assert heard.actions == []
    stranger = ContainerReport("by-hand", 0, Status.STOPPED)
    for removed in (False, True):
        fleet.state_changed("n2", stranger, removed)
        await look(notices)
    assert heard.actions == [
        ("container-unmanaged-found", "by-hand", "n2"),
        ("container-unmanaged-gone", "by-hand", "n2"),
    ]
    notices.close()


# ---------------------------------------------------------------- what an agent finds altered

FREE = Limits(None, None, (0, 1), None, 1024)


@pytest.mark.parametrize(
    ("config", "pinned", "now", "expected"),
    [
        ({}, (), FREE, {}),
        ({}, (), Limits(2**20, 5, (1,), (1000, 10_000), 1024), {
            "limits.memory": "1MiB", "limits.processes": "5", "limits.cpus": "pinned to 1",
            "limits.cpu.allowance": "1ms/10ms",
        }),
        ({"limits.memory": "64MiB"}, (), FREE, {"limits.memory": None}),
        ({"limits.memory": "10%"}, (), Limits(100 * 4096, None, (), None, 1024), {}),
        ({"limits.memory": "10001"}, (), Limits(8192, None, (), None, 1024), {}),
        ({"limits.cpus": "1"}, (1,), Limits(None, None, (1,), None, 1024), {}),
        ({"limits.cpus": "1"}, (1,), FREE, {"limits.cpus": "pinned to 0,1"}),
        ({"limits.cpu.allowance": "25ms/100ms"}, (), Limits(None, None, (), (25_000, 100_000), 1024), {}),
        ({"limits.cpu.allowance": "25ms/100ms"}, (), FREE, {"limits.cpu.allowance": None}),
        ({}, (), Limits(None, None, (), None, 77), {"limits.cpu.allowance": "share 77"}),
    ],
)  # fmt: skip
def test_limits_in_force(
    config: dict[str, str], pinned: tuple[int, ...], now: Limits, expected: dict[str, str | None]
) -> None:
    assert altered.limits(parse_config(config), pinned, now, 1000 * 4096, [0, 1], 1024) == expected


def test_the_tighter_of_two_directories_holds() -> None:
    inner = Limits(10, None, (1,), (50, 100), 2)
    assert tightest(Limits(20, 5, (0, 1), (20, 100), 1024), inner) == Limits(10, 5, (1,), (20, 100), 1024)
    assert tightest(FREE, None) == FREE


def test_lines_of_a_configuration() -> None:
    written = [("lxc.uts.name", "a"), ("lxc.cgroup2.memory.max", "5"), ("lxc.apparmor.profile", "generated")]
    there = [
        ("lxc.uts.name", "b"),
        ("lxc.cgroup2.memory.max", "6"),
        ("lxc.hook.start", "x"),
        ("lxc.mount.entry", "/var/lib/lxcfs/proc/stat proc/stat none bind 0 0"),
    ]
    assert altered.lines(written, written) == []
    assert altered.lines(written, there) == [
        Difference("limits.memory", "5B", "6B"),
        Difference("lxc.hook.start", None, "x"),
        Difference("lxc.uts.name", "a", "b"),
    ]


@given(st.integers(0, 2**62))
def test_a_size_is_shown_exactly(size: int) -> None:
    assert parse_size(format_exactly(size), "x") == size


def test_a_size_has_its_largest_unit() -> None:
    assert [format_exactly(size) for size in (64 * 2**20, 5 * 10**9, 1025)] == ["64MiB", "5GB", "1025B"]
