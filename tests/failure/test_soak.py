"""F13: a steady load for a long time with a kill each minute: neither memory nor descriptors grow.

Agents are killed by turns but for the last one; the controller is killed in the first third only. Measured is what
lives through the rest: the controller and the last agent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.failure.fleet import ProcessFleet, process_fleet
from tests.failure.invariants import check_flat, settled
from tests.failure.load import Load
from tests.failure.processes import Process
from tests.failure.report import Report

pytestmark = pytest.mark.failure("F13")
NODES = 3
MEMORY_A_MINUTE = 1_000_000.0
"""Bytes that resident memory may grow in a minute, by its slope over the measured time."""
MOST_DESCRIPTORS = 4.0
"""Descriptors that may be open more at the end of the measured time than at its begin, by the slope."""


@dataclass(frozen=True)
class Plan:
    """Seconds that the soak lasts, between two kills, and between two looks; operations a second."""

    lasts: float
    kill_every: float
    look_every: float
    rate: float


SHORT = Plan(lasts=21.0, kill_every=7.0, look_every=0.25, rate=10.0)
LONG = Plan(lasts=1800.0, kill_every=60.0, look_every=2.0, rate=10.0)


@dataclass
class Measured:
    """The figures of one process: the lowest in each slice of time, since load makes both go up and down."""

    process: Process
    slices: int
    descriptors: list[list[float]] = field(default_factory=list)
    memory: list[list[float]] = field(default_factory=list)

    def look(self, part: float) -> None:
        """Take both figures at this part (0 to 1) of the measured time."""
        index = min(self.slices - 1, int(part * self.slices))
        while len(self.memory) <= index:
            self.memory.append([])
            self.descriptors.append([])
        self.memory[index].append(float(self.process.resident()))
        self.descriptors[index].append(float(self.process.descriptors()))

    def lowest(self) -> tuple[list[float], list[float]]:
        """Memory and descriptors, one figure for each slice."""
        return [min(each) for each in self.memory if each], [min(each) for each in self.descriptors if each]


@pytest.fixture
def fleet() -> Iterator[ProcessFleet]:
    """Three nodes."""
    with process_fleet(NODES) as made:
        yield made


class Soak:
    """Kills by the plan, and what is measured meanwhile."""

    def __init__(self, fleet: ProcessFleet, plan: Plan, report: Report) -> None:
        self.fleet = fleet
        self.plan = plan
        self.report = report
        self.measured: list[Measured] = []
        self._victims = [*fleet.nodes[:-1]]

    def run(self) -> None:
        """Until its end."""
        began = last_kill = time.monotonic()
        third = self.plan.lasts / 3
        while (gone := time.monotonic() - began) < self.plan.lasts:
            if time.monotonic() - last_kill >= self.plan.kill_every:
                last_kill = time.monotonic()
                self._kill("controller" if gone <= third + 1 and self.report.faults % 2 == 0 else "")
            if gone > third + 2:
                self._look((gone - third) / (self.plan.lasts - third))
            time.sleep(self.plan.look_every)

    def _kill(self, name: str) -> None:
        name = name or self._victims[self.report.faults % len(self._victims)]
        self.fleet.processes()[name].kill()
        if name == "controller":
            self.fleet.start_controller()
        else:
            self.fleet.start_agent(name)
        self.report.faults += 1

    def _look(self, part: float) -> None:
        if not self.measured:
            controller, agent = self.fleet.controller, self.fleet.agents[self.fleet.nodes[-1]]
            assert controller is not None
            slices = 5 if self.plan is SHORT else 20
            self.measured = [Measured(process, slices) for process in (controller, agent)]
        for each in self.measured:
            each.look(part)


def test_nothing_grows(fleet: ProcessFleet, report: Report, long_run: bool) -> None:
    plan = LONG if long_run else SHORT
    load = Load(fleet, random.randrange(2**32), plan.rate, population=20)
    soak = Soak(fleet, plan, report)
    with load.running() as accepted:
        soak.run()
    fleet.heal()
    for found in settled(fleet, accepted.actions, accepted.expected):
        report.violation(found)
    report.figures |= {"operations acknowledged": len(accepted.actions)}
    minutes = plan.lasts * 2 / 3 / 60
    for each in soak.measured:
        assert each.process.running
        memory, descriptors = each.lowest()
        for found in check_flat(f"descriptors of {each.process.name}", descriptors, MOST_DESCRIPTORS):
            report.violation(found)
        # A process that has just begun still grows to its size: memory is judged in the long form only.
        if long_run:
            for found in check_flat(f"memory of {each.process.name}", memory, MEMORY_A_MINUTE * minutes):
                report.violation(found)
        report.figures[f"{each.process.name}'s descriptors"] = f"{descriptors[0]:.0f} to {descriptors[-1]:.0f}"
        report.figures[f"{each.process.name}'s memory"] = f"{memory[0] / 1e6:.1f} to {memory[-1] / 1e6:.1f} MB"
