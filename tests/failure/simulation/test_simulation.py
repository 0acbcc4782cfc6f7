"""F8: a controller and its agents in virtual time, through everything that a seed thinks of."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import executor
from agent.admission import Answer, Run
from agent.executor import Executor
from agent.journal import Journal
from common.errors import DriverFailed
from controller import app
from controller.fleet import Fleet
from controller.operations.engine import Engine
from controller.operations.kinds import Context, Kind, Step
from tests.failure.report import Report
from tests.failure.simulation import faults, network, world
from tests.failure.simulation.world import simulate

ROOT = Path(__file__).resolve().parents[3]
SEEDS, LONG_SEEDS, CHUNKS = 500, 10_000, 4
ENOUGH = 150
"""Seeds within which a broken mechanism must be noticed."""


def _chunks() -> list[Any]:
    return [pytest.param(chunk, marks=pytest.mark.failure(f"F8 {chunk + 1}/{CHUNKS}")) for chunk in range(CHUNKS)]


@pytest.mark.parametrize("chunk", _chunks())
def test_every_seed_comes_right(chunk: int, long_run: bool, report: Report) -> None:
    each = (LONG_SEEDS if long_run else SEEDS) // CHUNKS
    accepted, slowest = 0, 0.0
    for seed in range(chunk * each, (chunk + 1) * each):
        outcome = simulate(seed)
        report.faults += outcome.faults
        accepted += outcome.accepted
        slowest = max(slowest, outcome.settled_after)
        if outcome.violations:
            report.violation(outcome.describe())
    report.figures |= {"seeds": each, "operations": accepted, "slowest to settle": f"{slowest:.0f} s"}


def test_a_seed_replays_the_same() -> None:
    command = [sys.executable, "-m", "tests.failure.simulation", "--start", "3", "--seeds", "8"]
    digests = [
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": order}, check=True, capture_output=True, text=True
        ).stdout.rpartition("trace ")[2]
        for order in ("1", "4711")
    ]
    assert digests[0] == digests[1] and digests[0].strip()
    again = [simulate(seed).digest for seed in (3, 4, 3, 4)]
    assert again[:2] == again[2:] and again[0] != again[1]


# ---------------------------------------------------------------- what is broken on purpose must be noticed

Break = Callable[[pytest.MonkeyPatch], None]


def _no_answers(patch: pytest.MonkeyPatch) -> None:
    """A finished command that comes again is run again."""
    decide = executor.decide

    def forgetful(*arguments: Any) -> Any:
        decision = decide(*arguments)
        return Run(again=True) if isinstance(decision, Answer) else decision

    patch.setattr(executor, "decide", forgetful)
    patch.setattr(faults, "FAULTS", [fault for fault in faults.FAULTS if fault.name in ("storm", "connection breaks")])


def _no_fences(patch: pytest.MonkeyPatch) -> None:
    """A command of an earlier session, epoch or generation, or an expired one, is run."""

    def believing(command: Any, record: Any, _fences: Any, _now: float) -> Any:
        return Answer(record.result) if record is not None and record.result is not None else Run(record is not None)

    patch.setattr(executor, "decide", believing)
    patch.setattr(executor, "outdated", lambda *_: None)
    patch.setattr(faults, "FAULTS", [fault for fault in faults.FAULTS if fault.name in ("partition", "reboot")])
    patch.setattr(world, "IMPATIENT", 1.0)
    patch.setattr(network, "LATE", 1.0)


def _no_resume(patch: pytest.MonkeyPatch) -> None:
    """What was under way when the controller died is left there."""

    async def forget(_engine: Engine) -> None:
        return

    patch.setattr(Engine, "resume", forget)


def _with_kind(patch: pytest.MonkeyPatch, name: str, change: Callable[[Kind], Kind]) -> None:
    patch.setattr(app, "KINDS", {**app.KINDS, name: change(app.KINDS[name])})


def _no_undo(patch: pytest.MonkeyPatch) -> None:
    """What a failed creation made is left on its node."""
    _with_kind(
        patch, "container.create", lambda kind: replace(kind, steps=tuple(replace(s, undo=None) for s in kind.steps))
    )


def _no_release(patch: pytest.MonkeyPatch) -> None:
    """A container stays held by an operation that has ended."""
    _with_kind(patch, "container.start", lambda kind: replace(kind, succeeded=lambda *_: None))


def _started_twice(patch: pytest.MonkeyPatch) -> None:
    """A move that failed after its target ran starts the source again, and leaves the target."""

    def change(step: Step) -> Step:
        async def fail(context: Context) -> None:
            await step.do(context)
            raise DriverFailed("it says so")

        if step.name == "start":
            return replace(step, do=fail, undo=None)
        return replace(step, undo=None) if step.name == "copy" else step

    _with_kind(patch, "container.move", lambda kind: replace(kind, steps=tuple(change(step) for step in kind.steps)))


def _no_inventory(patch: pytest.MonkeyPatch) -> None:
    """What happened while nobody was connected is not taken over."""
    patch.setattr(Fleet, "inventory", lambda *_: None)


def _no_acknowledgement(patch: pytest.MonkeyPatch) -> None:
    """An agent tells its results for ever."""
    patch.setattr(Executor, "acknowledged", lambda *_: None)


def _results_not_kept(patch: pytest.MonkeyPatch) -> None:
    """An agent forgets what a command led to."""

    async def forget(_journal: Journal, _result: Any) -> None:
        return

    patch.setattr(Journal, "finish", forget)


@pytest.mark.parametrize(
    ("break_it", "invariants"),
    [
        (_no_resume, "I1"),
        (_no_answers, "I2"),
        (_no_fences, "I2 I3 I4 I6"),
        (_started_twice, "I3"),
        (_no_acknowledgement, "I4"),
        (_results_not_kept, "I4"),
        (_no_inventory, "I5"),
        (_no_undo, "I6"),
        (_no_release, "I6"),
    ],
)
def test_what_is_broken_is_caught(break_it: Break, invariants: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    for seed in range(ENOUGH):
        violated = {text.split(": ", 1)[1].split()[0] for text in simulate(seed).violations}
        if violated & set(invariants.split()):
            return
    pytest.fail(f"{break_it.__doc__} Nobody noticed in {ENOUGH} seeds.")
