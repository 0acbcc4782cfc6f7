"""The fleet in memory: what agents push, what rows say, and that one node never speaks for another."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.clock import ManualClock
from common.messages import Inventory, Outcome, Samples
from common.reports import ContainerReport, ContainerSample, ImageReport, NodeSample
from common.states import NodeStatus, Status
from controller.fleet import Fleet
from controller.live import CLOCK_STEP, MAX_UNCLAIMED
from controller.records import Change, Container, Image, Node, Phase, Snapshot
from tests.helpers.core import BUILT, FACTS

LOAD = NodeSample(1, 1, 0.5, (0.0, 0.0, 0.0), 9.0)
NOW = ManualClock().now().timestamp()


def container(id: str = "c", **changes: Any) -> Container:
    fields: dict[str, Any] = {
        "id": id,
        "node": "n1",
        "generation": 1,
        "hostname": id,
        "description": "",
        "config": {},
        "image": None,
        "hwaddr": "",
        "created_at": "",
        "phase": Phase.READY,
    }
    return Container(**{**fields, **changes})


def put(*records: Container) -> list[Change]:
    return [Change(Container, record.id, record) for record in records]


def report(id: str = "c", generation: int = 1, status: int = Status.RUNNING) -> ContainerReport:
    return ContainerReport(id, generation, status)


def inventory(*reports: ContainerReport) -> Inventory:
    return Inventory(FACTS, reports, (ImageReport("f" * 64, 1),))


def samples(at: float, *used: ContainerSample) -> Samples:
    return Samples(at, LOAD, used)


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet(ManualClock())
    nodes = [Node(name, name * 20, "", FACTS) for name in ("n1", "n2")]
    fleet.load(nodes, [container()], [Snapshot("c", "s0", "", {})], [BUILT])
    for node in ("n1", "n2"):
        fleet.node_status(node, NodeStatus.ONLINE, "")
    return fleet


def shown(fleet: Fleet, id: str = "c") -> Status:
    return fleet.status_of(fleet.containers[id]).status


# ---------------------------------------------------------------- rows


def test_a_container_that_moves_forgets_what_its_old_node_said(fleet: Fleet) -> None:
    fleet.inventory("n1", inventory(report()))
    fleet.outcome("n2", Outcome(container=report(generation=2), sample=ContainerSample("c", processes=7)), NOW)
    assert shown(fleet) is Status.RUNNING and fleet.nodes["n2"].unclaimed.keys() == {"c"}
    fleet.apply(put(container(node="n2", generation=2)))
    live = fleet.containers["c"]
    assert (fleet.nodes["n1"].containers, fleet.nodes["n2"].containers) == (set(), {"c"})
    assert live.report == report(generation=2) and live.sample == ContainerSample("c", processes=7)
    assert not fleet.nodes["n2"].unclaimed


def test_what_was_reported_of_another_generation_is_not_claimed(fleet: Fleet) -> None:
    fleet.state_changed("n2", report(generation=5), removed=False)
    fleet.apply(put(container(node="n2", generation=2)))
    assert fleet.containers["c"].report is None and fleet.nodes["n2"].unclaimed.keys() == {"c"}


def test_a_rename_keeps_report_and_snapshots(fleet: Fleet) -> None:
    fleet.inventory("n1", inventory(report()))
    fleet.outcome("n1", Outcome(container=report("e", status=Status.STOPPED)), None)
    renamed = Change(Snapshot, "e/s0", Snapshot("e", "s0", "", {}))
    fleet.apply([Change(Container, "c", None), *put(container("e")), renamed])
    assert fleet.containers.keys() == {"e"} and fleet.nodes["n1"].containers == {"e"}
    assert shown(fleet, "e") is Status.STOPPED and fleet.containers["e"].snapshots.keys() == {"s0"}


def test_rows_come_and_go(fleet: Fleet) -> None:
    image = msgspec.structs.replace(BUILT, fingerprint="d" * 64)
    revision = fleet.revision
    fleet.apply([Change(Node, "n3", Node("n3", "", "", FACTS)), Change(Image, image.fingerprint, image)])
    assert fleet.revision > revision and "n3" in fleet.nodes and image.fingerprint in fleet.images
    gone = [Change(Node, "n3", None), Change(Image, image.fingerprint, None), Change(Snapshot, "c/s0", None)]
    fleet.apply([*gone, Change(Container, "c", None), Change(Snapshot, "c/s1", Snapshot("c", "s1", "", {}))])
    assert "n3" not in fleet.nodes and fleet.images.keys() == {BUILT.fingerprint} and not fleet.containers


def test_every_visible_change_drops_the_answer_that_was_rendered(fleet: Fleet) -> None:
    changes = (
        lambda: fleet.apply(put(container(description="new"))),
        lambda: fleet.inventory("n1", inventory(report())),
        lambda: fleet.samples("n1", samples(NOW, ContainerSample("c"))),
        lambda: fleet.state_changed("n1", report(status=Status.STOPPED), removed=False),
        lambda: fleet.outcome("n1", Outcome(container=report()), None),
        lambda: fleet.node_status("n1", NodeStatus.OFFLINE, "gone"),
    )
    for change in changes:
        live, revision = fleet.containers["c"], fleet.revision
        live.rendered["full"] = b"old"
        change()
        assert not live.rendered and fleet.revision > revision


# ---------------------------------------------------------------- what agents push


def test_an_inventory_is_the_whole_truth_of_its_node(fleet: Fleet) -> None:
    fleet.inventory("n1", inventory(report(), report("mine", 0)))
    assert fleet.nodes["n1"].images == {"f" * 64: True} and fleet.nodes["n1"].unclaimed.keys() == {"mine"}
    fleet.inventory("n1", inventory())
    assert shown(fleet) is Status.ERROR and not fleet.nodes["n1"].unclaimed


def test_another_nodes_word_counts_for_nothing(fleet: Fleet) -> None:
    fleet.inventory("n1", inventory(report(status=Status.RUNNING)))
    fleet.samples("n1", samples(NOW, ContainerSample("c", processes=1)))
    false = report(status=Status.STOPPED)
    fleet.inventory("n2", inventory(false))
    fleet.samples("n2", samples(NOW, ContainerSample("c", processes=99)))
    fleet.state_changed("n2", false, removed=False)
    fleet.outcome("n2", Outcome(container=false, sample=ContainerSample("c", processes=99)), NOW)
    live = fleet.containers["c"]
    assert live.report is not None and live.report.status == Status.RUNNING
    assert live.sample is not None and live.sample.processes == 1
    fleet.state_changed("n2", false, removed=True)
    assert shown(fleet) is Status.RUNNING and not fleet.nodes["n2"].unclaimed
    fleet.node_status("n2", NodeStatus.OFFLINE, "")
    assert shown(fleet) is Status.RUNNING


def test_an_older_generation_says_nothing(fleet: Fleet) -> None:
    fleet.apply(put(container(generation=2)))
    fleet.inventory("n1", inventory(report(generation=1)))
    assert fleet.containers["c"].report is None and fleet.nodes["n1"].unclaimed.keys() == {"c"}


@given(st.lists(st.floats(0, CLOCK_STEP / 2), min_size=1, max_size=10))
def test_the_newest_figures_stay(ages: list[float]) -> None:
    fleet = Fleet(ManualClock())
    fleet.load([Node("n1", "", "", FACTS)], [container()], [], [])
    for age in ages:
        fleet.samples("n1", samples(NOW - age, ContainerSample("c", started_at=age)))
    live = fleet.containers["c"]
    assert live.sampled_at == NOW - min(ages)
    assert live.sample is not None and live.sample.started_at is not None
    assert NOW - live.sample.started_at == live.sampled_at


def test_a_wrong_clock_neither_freezes_the_figures_nor_breaks_their_time(fleet: Fleet) -> None:
    fleet.samples("n1", samples(1e300, ContainerSample("c", processes=1)))
    assert fleet.containers["c"].sampled_at == NOW == fleet.nodes["n1"].sampled_at
    fleet.samples("n1", samples(NOW - 3600, ContainerSample("c", processes=2)))
    sample = fleet.containers["c"].sample
    assert sample is not None and sample.processes == 2, "the clock was set back"
    fleet.samples("n1", samples(-5.0, ContainerSample("c")))
    assert fleet.containers["c"].sampled_at == NOW


@pytest.mark.parametrize("wrong", [-86400.0, -3600.0, 3600.0, 86400.0])
def test_figures_of_a_node_whose_clock_is_wrong_have_their_true_age(fleet: Fleet, wrong: float) -> None:
    fleet.samples("n1", samples(NOW + wrong, ContainerSample("c")))
    live, node = fleet.containers["c"], fleet.nodes["n1"]
    assert (live.sampled_at, node.sampled_at, node.clock_error) == (NOW, NOW, wrong)
    fleet.outcome("n1", Outcome(sample=ContainerSample("c")), NOW + wrong - 7)
    assert live.sampled_at == NOW, "a figure of before does not replace it"
    fleet.samples("n1", samples(NOW, ContainerSample("c")))
    assert (live.sampled_at, node.clock_error) == (NOW, 0.0)


def test_a_container_that_dies_and_one_that_is_removed(fleet: Fleet) -> None:
    fleet.state_changed("n1", report(status=Status.STOPPED), removed=False)
    assert shown(fleet) is Status.STOPPED
    fleet.state_changed("n1", report(status=Status.STOPPED), removed=True)
    assert shown(fleet) is Status.ERROR


def test_containers_of_nobodys_are_bounded_and_forgotten_when_a_command_removes_them(fleet: Fleet) -> None:
    for number in range(MAX_UNCLAIMED + 5):
        fleet.state_changed("n1", report(f"x{number}", 0), removed=False)
    assert len(fleet.nodes["n1"].unclaimed) == MAX_UNCLAIMED
    fleet.gone("n1", "x0")
    assert "x0" not in fleet.nodes["n1"].unclaimed


def test_a_node_that_is_not_known_is_not_heard(fleet: Fleet) -> None:
    fleet.inventory("n9", inventory(report()))
    fleet.samples("n9", samples(NOW, ContainerSample("c")))
    fleet.state_changed("n9", report(), removed=False)
    fleet.outcome("n9", Outcome(container=report()), NOW)
    fleet.node_status("n9", NodeStatus.ONLINE, "")
    fleet.gone("n9", "c")
    assert "n9" not in fleet.nodes and fleet.containers["c"].report is None


# ---------------------------------------------------------------- what readers see


@pytest.mark.parametrize(
    ("phase", "node", "reported", "status", "reason", "last"),
    [
        (Phase.CREATING, NodeStatus.OFFLINE, Status.RUNNING, Status.PENDING, None, None),
        (Phase.FAILED, NodeStatus.ONLINE, Status.STOPPED, Status.ERROR, "it broke", Status.STOPPED),
        (Phase.READY, NodeStatus.OFFLINE, Status.RUNNING, Status.ERROR, "out of reach", Status.RUNNING),
        (Phase.READY, NodeStatus.SUSPECT, Status.FROZEN, Status.FROZEN, None, None),
        (Phase.READY, NodeStatus.ONLINE, None, Status.ERROR, "does not have", None),
        (Phase.READY, NodeStatus.ONLINE, Status.RUNNING, Status.RUNNING, None, None),
        (Phase.READY, NodeStatus.ONLINE, 999, Status.ERROR, None, None),
        (Phase.READY, NodeStatus.ONLINE, Status.SUCCESS, Status.ERROR, None, None),
    ],
)
def test_the_status_that_is_shown(
    fleet: Fleet,
    phase: Phase,
    node: NodeStatus,
    reported: int | None,
    status: Status,
    reason: str | None,
    last: Status | None,
) -> None:
    fleet.inventory("n1", inventory(*([] if reported is None else [report(status=reported)])))
    fleet.apply(put(container(phase=phase, error="it broke" if phase is Phase.FAILED else None)))
    fleet.node_status("n1", node, "no heartbeat")
    now = fleet.status_of(fleet.containers["c"])
    assert (now.status, now.last) == (status, last)
    assert reason is None or reason in (now.reason or "")


def test_generations_are_what_rows_say(fleet: Fleet) -> None:
    fleet.apply(put(container("b", generation=7), container("o", node="n2")))
    assert fleet.generations("n1") == {"b": 7, "c": 1} and fleet.generations("n9") == {}


def test_kept_figures_count_until_the_node_reports_again(fleet: Fleet) -> None:
    entry = {"report": msgspec.to_builtins(report()), "sample": {"id": "c", "processes": 3}, "sampled_at": 5.0}
    kept = {"last_seen": "then", "containers": [entry]}
    fleet.restore("n1", kept)
    assert fleet.containers["c"].report is None, "it is online and has spoken for itself"
    fleet.node_status("n1", NodeStatus.OFFLINE, "")
    fleet.restore("n1", kept)
    live = fleet.containers["c"]
    assert live.sampled_at == 5.0 and fleet.status_of(live).last is Status.RUNNING
    fleet.samples("n1", samples(NOW, ContainerSample("c", processes=4)))
    assert live.sample is not None and live.sample.processes == 4


def test_a_stopped_container_keeps_its_disk_figures_only(fleet: Fleet) -> None:
    fleet.inventory("n1", inventory(report()))
    full = ContainerSample("c", disk_usage=5, memory_usage=7, pid=9)
    fleet.samples("n1", samples(NOW - 2, full))
    assert fleet.containers["c"].figures == full
    fleet.state_changed("n1", report(status=Status.STOPPED), removed=False)
    fleet.samples("n1", samples(NOW - 1, full))
    assert fleet.containers["c"].figures == ContainerSample("c", disk_usage=5), "taken before it stopped, told after"
    fleet.state_changed("n1", report(), removed=False)
    assert fleet.containers["c"].figures == full, "a batch may overtake the word that it has started"
