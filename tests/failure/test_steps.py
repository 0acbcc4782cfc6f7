"""F3: every step of every kind of operation failed in turn, every step and every undo run twice, died in and resumed.

One generic test: a kind that is added to the catalogue is tried without another line here, but for its request.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.operations.catalogue import KINDS
from controller.operations.engine import Engine
from tests.failure.report import Report
from tests.failure.steps import Script, expected, faults_of, led_to, run
from tests.helpers.accepting import ACCEPT
from tests.helpers.core import make_template

pytestmark = pytest.mark.failure("F3")
DEADLY: tuple[set[str], ...] = (set(), {"after"}, {"cancel"}, {"after", "twice"})
"""The faults that are tried with a death of the controller at every point, too."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory: what is tried here hundreds of times is not the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_every_kind_is_tried() -> None:
    assert ACCEPT.keys() == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
async def test_every_fault_at_every_step_and_every_point(
    template: Path, memory: Path, report: Report, name: str
) -> None:
    report.name = f"F3 {name}"
    numbers = itertools.count()
    results = {}
    for faults in faults_of(KINDS[name]):
        calm = Script(faults)
        ended, wanted = await run(template, memory / str(next(numbers)), name, calm)
        results[str(faults)] = wanted
        excused = "late" in faults.values() or "left_behind" in str(ended.outputs)
        report.check(excused or ended.status is expected(KINDS[name], faults), f"{faults}: {ended.error}")
        if set(faults.values()) == {"twice"}:
            report.check(wanted == results["{}"], f"{faults}: twice led elsewhere than once")
        deaths = [Script(faults, die_at=point) for point in range(len(calm.points))]
        report.faults += len(faults)
        if set(faults.values()) in DEADLY:
            report.faults += len(deaths)
            runs = (run(template, memory / str(next(numbers)), name, death) for death in deaths)
            for death, (_, reached) in zip(deaths, await asyncio.gather(*runs), strict=True):
                assert death.dead.is_set()
                report.check(
                    led_to(reached, wanted), f"{faults}, died at {calm.points[death.die_at]}: it led elsewhere"
                )


# ---------------------------------------------------------------- what is broken is found


async def test_an_undo_left_out_is_caught(template: Path, memory: Path) -> None:
    kind = KINDS["container.create"]
    steps = tuple(replace(step, undo=None) for step in kind.steps)
    with pytest.raises(AssertionError):
        await run(template, memory, kind.name, Script({"start/do": "after"}), replace(kind, steps=steps))


async def test_a_container_that_is_not_set_free_is_caught(template: Path, memory: Path) -> None:
    kind = replace(KINDS["container.start"], succeeded=lambda _transaction, _operation: None)
    with pytest.raises(AssertionError):
        await run(template, memory, kind.name, Script({}), kind)


async def test_an_operation_that_is_not_resumed_is_caught(
    template: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forget(_engine: Engine) -> None:
        return

    monkeypatch.setattr(Engine, "resume", forget)
    with pytest.raises(AssertionError):
        await run(template, memory, "container.start", Script({}, die_at=0))
