"""A bandwidth limit: a token bucket that lets frames go evenly."""

from __future__ import annotations

from agent.channel.window import FRAME

SMOOTHNESS = 0.05
"""Seconds of the rate which a frame may take, and which may be made up for after a pause."""
SMALLEST = 4096


class Rate:
    """Lets so many bytes per second go (None: any number). Times are seconds of one monotonic clock."""

    def __init__(self, rate: int | None, now: float) -> None:
        self._rate = rate
        self._at = now
        self._tokens = 0.0
        self.frame = FRAME if rate is None else min(FRAME, max(SMALLEST, int(rate * SMOOTHNESS)))
        """Bytes in a frame at most, so that it does not hold back what comes after it."""

    def delay(self, now: float) -> float:
        """Seconds until the next frame may go; 0: now."""
        if self._rate is None:
            return 0.0
        most = max(self._rate * SMOOTHNESS, SMALLEST)
        self._tokens = min(most, self._tokens + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, -self._tokens / self._rate)

    def spend(self, size: int) -> None:
        """So many bytes go now; they may go into debt, which the next ones wait for."""
        if self._rate is not None:
            self._tokens -= size
