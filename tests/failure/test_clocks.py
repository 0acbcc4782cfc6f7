"""F11: wall clocks that are wrong by an hour or a day, set forwards and back while all runs, or run fast or slow."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pytest

from agent import enrolment
from agent.config import AgentConfig
from common.clock import SystemClock
from common.errors import VzfleetError
from tests.failure.clocks import DAY, HOUR, FakeClock
from tests.failure.fleet import ProcessFleet, process_fleet
from tests.failure.invariants import operations, settled
from tests.failure.report import Report

NODE = "node1"
STEPS = (HOUR, -HOUR, DAY, -DAY)
FAST, SLOW = 600.0, 0.01
"""Ten minutes a second, and next to standing still."""
TOKEN_LIFE = 3.0
HISTORY = 12 * HOUR
IMAGE = {"type": "image", "properties": {"os": "busybox"}}


class Clocked:
    """A fleet whose controller and agent have clocks of their own."""

    def __init__(self, fleet: ProcessFleet, **environment: str) -> None:
        self.fleet = fleet
        self.controller, self.agent = FakeClock(fleet.directory), FakeClock(fleet.directory)
        self._environment = environment
        self._names = (f"c{number}" for number in itertools.count())
        self.accepted: list[str] = []

    def start(self) -> None:
        """Start the controller anew, by its clock."""
        if self.fleet.controller is not None:
            self.fleet.controller.stop()
        self.fleet.start_controller(**self.controller.environment(), **self._environment)

    def up(self) -> None:
        """Start everything."""
        self.start()
        self.fleet.join(NODE)
        self.fleet.start_agent(NODE, **self.agent.environment())
        self.fleet.wait_online()

    def work(self, report: Report, what: str, speed: float = 1.0) -> None:
        """A container's life, whose figures have their true age by the controller's clock."""
        path = f"/1.0/vz/{next(self._names)}"
        made = self._done("POST", path, {"source": IMAGE, "start": True})
        view = self.fleet.call("GET", path).metadata["status"]
        age = _seconds(made["updated_at"]) - _seconds(view["sampled_at"])
        report.check(abs(age) < 5 * max(1.0, speed), f"{what}: figures of now are shown as {age:.0f} s old")
        self._done("PUT", f"{path}/state", {"action": "stop"})
        self._done("DELETE", path)

    def _done(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        ended = self.fleet.done(method, path, body)
        self.accepted.append(str(ended["id"]))
        return ended

    def losses(self) -> int:
        """How often the controller has taken a node for lost."""
        log = (self.fleet.directory / "controller.log").read_text(errors="replace")
        return log.count('"status": "Offline"') + log.count('"status": "Suspect"')


@contextmanager
def clocked(**environment: str) -> Iterator[Clocked]:
    """A running fleet of one node."""
    options = {"join_token_lifetime": TOKEN_LIFE, "operation_history": HISTORY}
    with process_fleet(0, **options) as fleet:
        made = Clocked(fleet, **environment)
        made.up()
        yield made


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def may_join(fleet: ProcessFleet, token: str, name: str) -> bool:
    """Whether a join token is still good; the node is forgotten again."""
    config = AgentConfig(state=fleet.directory / name, node=name, driver="fake")
    try:
        asyncio.run(enrolment.join(token, config, SystemClock()))
    except VzfleetError:
        return False
    fleet.call("DELETE", f"/1.0/nodes/{name}")
    return True


def check_tokens(subject: Clocked, report: Report, steps: tuple[float, ...] = STEPS) -> None:
    """A token's life does not change when the clock is set."""
    for step in steps:
        early, late = (subject.fleet.call("POST", "/1.0/nodes", {}).metadata["token"] for _ in range(2))
        made = time.monotonic()
        subject.controller.set(step)
        report.faults += 1
        name = f"joins{steps.index(step)}"
        report.check(may_join(subject.fleet, early, name), f"{step:+.0f} s: a good token is refused")
        time.sleep(max(0.0, made + TOKEN_LIFE + 1.0 - time.monotonic()))
        report.check(not may_join(subject.fleet, late, f"{name}-late"), f"{step:+.0f} s: an old token is good")
        subject.controller.set(0)


def check_history(subject: Clocked, report: Report) -> None:
    """What is known is known in its order, and a controller that starts with a wrong clock does not forget it."""
    for step in (DAY, -DAY, 0.0):
        subject.controller.set(step)
        report.faults += 1
        subject.start()
        subject.fleet.wait_online()
        subject.work(report, f"started {step:+.0f} s off")
        known = operations(subject.fleet)
        lost = [identity for identity in subject.accepted if identity not in known]
        report.check(not lost, f"{step:+.0f} s: {len(lost)} of {len(subject.accepted)} operations are forgotten")
    report.check(subject.accepted == sorted(subject.accepted), "operations are not in the order of their creation")


@pytest.mark.failure("F11")
def test_wrong_clocks(report: Report) -> None:
    with clocked() as subject:
        subject.work(report, "at first")
        sides = {"controller": subject.controller, "agent": subject.agent}
        for (name, clock), step in itertools.product(sides.items(), STEPS):
            for ahead in (step, 0.0):
                clock.set(ahead)
                report.faults += 1
                subject.work(report, f"{name} {ahead:+.0f} s")
        for (name, clock), speed in itertools.product(sides.items(), (FAST, SLOW)):
            clock.set(0, speed)
            report.faults += 1
            subject.work(report, f"{name} at {speed:g} times the speed", speed)
            clock.set(0)
        check_tokens(subject, report)
        report.check(not subject.losses(), f"a node was taken for lost {subject.losses()} times")
        check_history(subject, report)
        for found in settled(subject.fleet, subject.accepted):
            report.violation(found)
        report.figures |= {"operations": len(subject.accepted), "nodes taken for lost": subject.losses()}


@pytest.mark.failure("F11 by the wall clock")
def test_lifetimes_by_the_wall_clock_are_caught(report: Report) -> None:
    """Had lifetimes no clock of their own, tokens and history would change with the wall clock."""
    with clocked(VZFLEET_LIFETIMES_BY_THE_WALL="1") as subject:
        subject.work(report, "at first")
        found = Report("by the wall clock")
        check_tokens(subject, found, (DAY, -DAY))
        check_history(subject, found)
        report.faults += found.faults
        text = "\n".join(found.violations)
        assert "a good token is refused" in text and "an old token is good" in text and "are forgotten" in text, text
