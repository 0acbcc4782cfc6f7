"""F2: `kill -9` of an agent at every boundary of every command, on the way forth and back.

Which commands an operation sends is learned from one that nothing disturbs, and from one that is made to turn back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from agent.executor import BOUNDARIES
from controller.operations.catalogue import KINDS
from tests.failure import points, scenarios
from tests.failure.fleet import ProcessFleet, process_fleet
from tests.failure.invariants import as_it_is, settled
from tests.failure.points import Effects, Learned
from tests.failure.report import Report
from tests.failure.scenarios import SCENARIOS

pytestmark = pytest.mark.failure("F2")
SHORT = 14
Turn = tuple[str, dict[str, Any]]


@pytest.fixture
def fleet() -> Iterator[ProcessFleet]:
    """Two nodes."""
    with process_fleet(2) as made:
        yield made


@dataclass(frozen=True)
class Place:
    """Where an agent is killed: at which boundary of which command of an operation, which may be made to turn back."""

    kind: str
    node: str
    command: str
    boundary: str
    turn: Turn | None

    @property
    def name(self) -> str:
        """As the agent calls it."""
        return f"agent/{self.command}/{self.boundary}"

    @property
    def transfers(self) -> bool:
        """Whether data is on its way between two nodes: then it is undone instead of resumed."""
        return "-send" in self.command or "-receive" in self.command


def all_places(fleet: ProcessFleet, learned: dict[str, Learned]) -> list[Place]:
    """All boundaries of all commands of all kinds."""
    found = []
    for kind, forth in learned.items():
        ways: list[tuple[Turn | None, Learned]] = [(None, forth)]
        for step, undoable in enumerate(KINDS[kind].shape.undoable):
            if undoable:
                turn = points.fault_for(KINDS[kind], step, forth)
                ways.append((turn, points.learn(fleet, kind, turn)))
        found += [
            Place(kind, node, command, boundary, turn)
            for turn, way in ways
            for node, command in way.commands
            for boundary in BOUNDARIES
            if turn is None or "/undo" in command
        ]
    return found


class Run:
    """The places one after the other on one fleet."""

    def __init__(self, fleet: ProcessFleet, report: Report) -> None:
        self.fleet = fleet
        self.report = report
        self.learned = {kind: points.learn(fleet, kind) for kind in SCENARIOS}
        self.accepted: list[str] = []
        self.expected: dict[str, Effects] = {}
        report.figures |= {"resumed": 0, "undone": 0}

    def at(self, place: Place) -> None:
        """Kill the agent there, start it again, and check everything."""
        fleet, container = self.fleet, scenarios.new_name()
        SCENARIOS[place.kind].prepare(fleet, container)
        before = as_it_is(fleet, container)
        agent = fleet.restart_agent(place.node, place.name)
        if place.turn is not None:
            fleet.script(place.turn[0], faults=[place.turn[1]])
        identity = SCENARIOS[place.kind].ask(fleet, container).operation
        assert identity is not None, place
        assert agent.wait(20) == -9, f"{place.name} is no place of the agent"
        self.report.faults += 1
        for node in fleet.nodes:
            fleet.script(node)
        fleet.start_agent(place.node)
        self.accepted.append(identity)
        self._check(place, identity, container, before)
        scenarios.clean_up(fleet, container)

    def _check(self, place: Place, identity: str, container: str, before: object) -> None:
        operation = self.fleet.operation(identity)
        undone = operation["status"] == "Failure"
        self.report.figures["undone" if undone else "resumed"] += 1
        if place.turn is None and not undone:
            self.expected[identity] = self.learned[place.kind].expected
        for found in settled(self.fleet, [identity], self.expected):
            self.report.violation(f"{place.kind} {place.name}: {found}")
        allowed = undone if place.turn else (not undone or place.transfers)
        self.report.check(allowed, f"{place.kind} {place.name}: {operation['status']}: {operation['err']}")
        if undone:
            after = as_it_is(self.fleet, container)
            self.report.check(after == before, f"{place.name}: it was undone, but {before} became {after}")


def test_killed_at_the_boundaries_of_commands(fleet: ProcessFleet, report: Report, long_run: bool) -> None:
    run = Run(fleet, report)
    places = all_places(fleet, run.learned)
    if not long_run:
        seed = int(os.environ.get("VZFLEET_SEED") or random.randrange(2**32))
        print(f"seed {seed}")
        places = random.Random(seed).sample(places, SHORT)
    for place in places:
        run.at(place)
    for found in settled(fleet, run.accepted, run.expected):
        report.violation(found)
