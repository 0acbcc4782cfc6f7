"""F1: `kill -9` of the controller at every step boundary, before and after its commit, on the way forth and back.

The list of places comes from the catalogue of kinds; that each is a place of the engine is proven by the controller's
end there. By default a few of them, chosen by a seed that is printed; with `--long` all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator

import pytest

from controller.operations.catalogue import KINDS
from tests.failure import points, scenarios
from tests.failure.fleet import Answer, ProcessFleet, process_fleet
from tests.failure.invariants import as_it_is, check_effects, operations, rows, settled
from tests.failure.points import Effects, Point
from tests.failure.processes import until
from tests.failure.report import Report
from tests.failure.scenarios import SCENARIOS

pytestmark = pytest.mark.failure("F1")
SHORT = 10


@pytest.fixture
def fleet() -> Iterator[ProcessFleet]:
    """Two nodes, which know the scenarios' image already."""
    with process_fleet(2) as made:
        yield made


def test_every_kind_has_its_scenario() -> None:
    """A kind that is new has no untested boundary."""
    assert SCENARIOS.keys() == KINDS.keys() - scenarios.WITHOUT.keys()
    assert all(KINDS[kind].steps == KINDS[same].steps for kind, same in scenarios.WITHOUT.items())
    names = [point.name for point in points.all_points()]
    assert len(names) == len(set(names))
    for kind in SCENARIOS:
        back = [undoable for undoable in KINDS[kind].shape.undoable if undoable]
        expected = len(points.BOUNDARIES) * (len(KINDS[kind].steps) + len(back))
        assert sum(name.startswith(f"{kind}/") for name in names) == expected


def chosen(long_run: bool) -> list[Point]:
    """All places, or some of them: at least one on the way back."""
    every = points.all_points()
    if long_run:
        return every
    seed = int(os.environ.get("VZFLEET_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    picked = set(random.Random(seed).sample(range(len(every)), SHORT))
    return [point for index, point in enumerate(every) if index in picked]


class Run:
    """The places one after the other on one fleet: the start that heals it is armed with the next place."""

    def __init__(self, fleet: ProcessFleet, report: Report, places: Iterable[Point]) -> None:
        self.fleet = fleet
        self.report = report
        # Before the first place is armed.
        self.learned = {kind: points.learn(fleet, kind) for kind in sorted({place.kind for place in places})}
        self.accepted: list[str] = []
        self.expected: dict[str, Effects] = {}
        report.figures |= {"resumed": 0, "undone": 0}

    def at(self, point: Point, following: Point | None) -> None:
        """Kill the controller there, start it again, and check everything."""
        fleet, scenario = self.fleet, SCENARIOS[point.kind]
        container = scenarios.new_name()
        scenario.prepare(fleet, container)
        before = as_it_is(fleet, container)
        if point.act == "undo":
            node, fault = points.fault_for(KINDS[point.kind], point.step, self.learned[point.kind])
            fleet.script(node, faults=[fault])
        answer = scenario.ask(fleet, container)
        assert fleet.controller is not None
        assert fleet.controller.wait(20) == -9, f"{point.name} is no place of the engine"
        self.report.faults += 1
        # What is resumed, or cleans up, must not meet the next place.
        later = following is not None and following.kind in (point.kind, *scenarios.CLEANING)
        fleet.start_controller(following.name if following and not later else "")
        fleet.wait_online()
        identity = answer.operation or self._unanswered(answer, point.kind)
        self._check(point, identity, container, before)
        for node in fleet.nodes:
            fleet.script(node)
        scenarios.clean_up(fleet, container)
        if following is not None and later:
            fleet.restart_controller(following.name)
            fleet.wait_online()

    def _unanswered(self, answer: Answer, kind: str) -> str:
        """The operation whose 202 the kill cut off: it was written, or its steps would not have begun."""
        assert answer.code == 0, answer
        return max(identity for identity, each in operations(self.fleet).items() if each["kind"] == kind)

    def _check(self, point: Point, identity: str, container: str, before: object) -> None:
        self.accepted.append(identity)
        back = point.act == "undo"
        if not back:
            self.expected[identity] = self.learned[point.kind].expected
        for found in settled(self.fleet, [identity], self.expected):
            self.report.violation(f"{point.name}: {found}")
        operation = self.fleet.operation(identity)
        wanted = "Failure" if back else "Success"
        self.report.figures["undone" if back else "resumed"] += 1
        self.report.check(operation["status"] == wanted, f"{point.name}: {wanted} expected, not {operation}")
        if back:
            after = as_it_is(self.fleet, container)
            self.report.check(after == before, f"{point.name}: it was undone, but {before} became {after}")


def test_killed_at_step_boundaries(fleet: ProcessFleet, report: Report, long_run: bool) -> None:
    places = chosen(long_run)
    run = Run(fleet, report, places)
    fleet.restart_controller(places[0].name)
    fleet.wait_online()
    for point, following in zip(places, [*places[1:], None], strict=True):
        run.at(point, following)
    for found in settled(fleet, run.accepted, run.expected):
        report.violation(found)


@pytest.mark.failure("F1 in a transfer")
def test_killed_in_the_middle_of_a_transfer(fleet: ProcessFleet, report: Report) -> None:
    """It is resumed or undone; either way the container is whole, and runs in one place."""
    for kind in ("container.move", "container.copy"):
        for slow in ("container.send", "container.receive"):
            killed_in_a_transfer(fleet, report, kind, slow)


def killed_in_a_transfer(fleet: ProcessFleet, report: Report, kind: str, slow: str) -> None:
    """Kill the controller while one end of a transfer is at its work, and check everything."""
    learned = points.learn(fleet, kind)
    container = scenarios.new_name()
    SCENARIOS[kind].prepare(fleet, container)
    before = as_it_is(fleet, container)
    for node in fleet.nodes:
        fleet.script(node, delays={slow: 0.7})
    identity = SCENARIOS[kind].ask(fleet, container).operation
    assert identity is not None
    until(lambda: begun(fleet, f"{identity}/%-{slow.partition('.')[2]}"), "the transfer is on")
    fleet.restart_controller()
    report.faults += 1
    for node in fleet.nodes:
        fleet.script(node)
    fleet.wait_online()
    for found in settled(fleet, [identity], {identity: learned.expected}):
        report.violation(found)
    ended = fleet.operation(identity)["status"]
    report.figures[f"{kind} {slow}"] = ended
    after = as_it_is(fleet, container)
    moved = kind == "container.move" and ended == "Success"
    assert isinstance(before, dict) and isinstance(after, dict)
    report.check(after["status"] == before["status"], f"{kind}: {before} became {after}")
    report.check(moved or after == before, f"{kind}: {before} became {after}")


def begun(fleet: ProcessFleet, pattern: str) -> bool:
    """Whether a command like this stands in a journal and has no result yet."""
    query = f"SELECT 1 FROM commands WHERE id LIKE '{pattern}' AND result IS NULL"
    return any(rows(fleet.state(node) / "journal.db", query) for node in fleet.nodes)


def test_a_boundary_without_a_journal_is_caught() -> None:
    """Had the agent no journal, a resumed start would be done anew under the same command."""
    done = ("node1", "container.start", "c", "op/start/do")
    assert check_effects([done], {"op": {"status": "Success"}}, {"op": [("start/do", "container.start")]}) == []
    assert check_effects([done, done], {"op": {"status": "Success"}})
