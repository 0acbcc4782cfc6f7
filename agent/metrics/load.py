"""A share of CPU time over the last interval."""

from __future__ import annotations

_SHORTEST = 1.0
"""Seconds: a sample asked for in between does not shorten the interval of the next one."""
_SHORTEST_MEASURED = 0.05
"""Seconds: over less than that, one tick of the scheduler decides what would come out."""


class Load:
    """Turns a growing counter of CPU seconds into a share between two points in time."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []

    def start(self, now: float, used: float) -> None:
        """Set the point from which the first share is measured."""
        self._points = [(now, used)]

    def share(self, now: float, used: float, cpus: float) -> float | None:
        """The share of `cpus` CPUs used since the last point, 0 to 1; None when there is none, or it is too near.

        `now` in seconds of a clock that never goes back, `used` in CPU seconds.
        """
        if self._points and used < self._points[-1][1]:
            self._points.clear()  # another counter: it began anew
        recent = [point for point in self._points if now - point[0] >= _SHORTEST]
        base = recent[-1] if recent else (self._points[0] if self._points else None)
        if base is None or now - self._points[-1][0] >= _SHORTEST:
            self._points = [*self._points[-1:], (now, used)]
        if base is None or now - base[0] < _SHORTEST_MEASURED or cpus <= 0:
            return None
        return min(1.0, max(0.0, (used - base[1]) / (now - base[0]) / cpus))
