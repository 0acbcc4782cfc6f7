"""How far a command is: at most twice a second, with the speed of the last seconds."""

from __future__ import annotations

import pytest

from agent.progress import ProgressReporter
from common.clock import ManualClock
from common.messages import Progress


def reporter() -> tuple[ProgressReporter, ManualClock, list[Progress]]:
    clock, sent = ManualClock(), []
    return ProgressReporter("op/1/do", clock, sent.append), clock, sent


def test_at_most_twice_a_second() -> None:
    report, clock, sent = reporter()
    for percent in range(100):
        report("unpacking", percent)
        clock.advance(0.01)
    assert [told.percent for told in sent] == [0, pytest.approx(50, abs=1)]


def test_speed_total_and_what_remains() -> None:
    report, clock, sent = reporter()
    for second in range(1, 11):
        clock.advance(1.0)
        report.transferred("files", second * 1_000_000, 20_000_000)
    assert sent[-1] == Progress("op/1/do", "files", 50, 10_000_000, 1_000_000, 20_000_000, 10)


def test_the_speed_is_that_of_the_last_seconds() -> None:
    report, clock, sent = reporter()
    done = 0
    for speed in (10_000_000, 1_000_000):
        for _ in range(20):
            clock.advance(1.0)
            done += speed
            report.transferred("files", done)
    assert sent[-1].speed == 1_000_000
    assert (sent[-1].percent, sent[-1].total, sent[-1].remaining) == (None, None, None)


def test_a_round_that_begins_anew_has_no_negative_speed() -> None:
    report, clock, sent = reporter()
    for processed in (5_000_000, 6_000_000, 1_000, 1_001_000):
        clock.advance(1.0)
        report.transferred("files", processed, 10_000_000)
    assert [told.speed for told in sent] == [5_000_000, 3_000_000, None, 1_000_000]


def test_nothing_to_send_is_done() -> None:
    report, clock, sent = reporter()
    clock.advance(1.0)
    report.transferred("files", 0, 0)
    assert sent[0].percent == 100
