"""Time, passed in: decisions never ask the machine for it, so that a test can move it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Where a component gets its time from."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; its zero means nothing."""
        ...

    def now(self) -> datetime:
        """Wall time in UTC, for display and records only."""
        ...


class SystemClock:
    """The machine's own clocks. CLOCK_BOOTTIME also counts while the machine sleeps."""

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def now(self) -> datetime:
        return datetime.now(UTC)


class SteadyClock:
    """Wall time for lifetimes: what `clock` shows first, from then on carried by its monotonic time.

    Setting the machine's clock changes no lifetime that is measured with it. `at_most` is believed instead of a later
    first time.
    """

    def __init__(self, clock: Clock, at_most: datetime | None = None) -> None:
        self._clock = clock
        self._began = clock.monotonic()
        self._first = clock.now() if at_most is None else min(clock.now(), at_most)

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def now(self) -> datetime:
        return self._first + timedelta(seconds=self._clock.monotonic() - self._began)


class ManualClock:
    """A clock that a test moves by hand."""

    def __init__(self, monotonic: float = 1000.0, now: datetime | None = None) -> None:
        self._monotonic = monotonic
        self._now = now or datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic(self) -> float:
        return self._monotonic

    def now(self) -> datetime:
        return self._now

    def set(self, now: datetime) -> None:
        """Set the wall clock, as its owner or the network's time may."""
        self._now = now

    def advance(self, seconds: float) -> None:
        """Move both clocks forward."""
        self._monotonic += seconds
        self._now += timedelta(seconds=seconds)


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds, as the REST API prints times."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def timestamp_of(seconds: float) -> str | None:
    """`timestamp` of seconds since 1970; None for what is in no calendar, which a node may claim all the same."""
    try:
        return timestamp(datetime.fromtimestamp(seconds, UTC))
    except (OverflowError, ValueError, OSError):
        return None
