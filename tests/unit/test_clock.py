"""What holds while somebody sets the clock: lifetimes, and the order of operations."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from common.clock import ManualClock, SteadyClock, timestamp
from controller.identifiers import OperationIds

STEPS = [timedelta(hours=1), -timedelta(hours=1), timedelta(days=1), -timedelta(days=1)]


@pytest.mark.parametrize("step", STEPS)
def test_a_steady_clock_does_not_step(step: timedelta) -> None:
    clock = ManualClock()
    steady = SteadyClock(clock)
    began = steady.now()
    clock.advance(10)
    clock.set(clock.now() + step)
    clock.advance(5)
    assert steady.now() - began == timedelta(seconds=15)
    assert steady.monotonic() == clock.monotonic()


def test_a_steady_clock_believes_no_later_time_than_it_is_told() -> None:
    clock = ManualClock()
    known = clock.now()
    clock.set(known + timedelta(days=400))
    assert SteadyClock(clock, known).now() == known
    assert SteadyClock(clock, known + timedelta(days=500)).now() == clock.now()


def test_ids_are_in_order_whatever_the_clock_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10**18, 10**18 + 10**15, 10**18 - 10**15, 10**18 + 1, 5, 10**18 + 2 * 10**15])
    monkeypatch.setattr(time, "time_ns", lambda: next(moments))
    ids = OperationIds()
    made = [ids.new() for _ in range(6)]
    assert made == sorted(made) and len(set(made)) == 6
    assert {uuid.UUID(each).version for each in made} == {7}
    assert {uuid.UUID(each).variant for each in made} == {uuid.RFC_4122}


def test_ids_go_on_after_those_of_an_earlier_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 2 * 10**18)
    earlier = OperationIds().new()
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    ids = OperationIds()
    ids.follow(earlier)
    assert earlier < ids.new() < ids.new()


def test_an_id_tells_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_123_456_789)
    assert uuid.UUID(OperationIds().new()).int >> 80 == 1_700_000_000_123


def test_a_timestamp_of_any_year_can_be_read_again() -> None:
    for year in (1, 500, 2026, 9999):
        moment = datetime(year, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
        text = timestamp(moment)
        assert text == f"{year:04}-01-02T03:04:05.000006Z" and datetime.fromisoformat(text) == moment
