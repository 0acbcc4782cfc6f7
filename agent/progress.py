"""How far a command is, told to the controller at most twice a second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from common.clock import Clock
from common.messages import Progress

INTERVAL = 0.5
SPEED_OVER = 5.0
"""Seconds over which a speed is taken."""


class ProgressReporter:
    """Sends Progress of one command. Callable as the drivers' `ReportProgress`."""

    def __init__(self, command: str, clock: Clock, send: Callable[[Progress], None]) -> None:
        self._command = command
        self._clock = clock
        self._send = send
        self._told = float("-inf")
        self._marks: deque[tuple[float, int]] = deque([(clock.monotonic(), 0)])
        """How many bytes were through at what time, over the last seconds."""

    def __call__(self, stage: str, percent: int | None = None) -> None:
        """Tell the stage and the percentage (None: not known)."""
        now = self._clock.monotonic()
        if self._may_tell(now):
            self._send(Progress(self._command, stage[:128], percent))

    def transferred(self, stage: str, processed: int, total: int | None = None) -> None:
        """Tell how many bytes are through, of how many as far as that is known."""
        now = self._clock.monotonic()
        if not self._may_tell(now):
            return
        speed = self._speed(now, processed)
        percent = remaining = None
        if total is not None:
            percent = min(100, processed * 100 // total) if total else 100
            remaining = max(0, total - processed) // speed if speed else None
        self._send(Progress(self._command, stage[:128], percent, processed, speed, total, remaining))

    def _may_tell(self, now: float) -> bool:
        if now - self._told < INTERVAL:
            return False
        self._told = now
        return True

    def _speed(self, now: float, processed: int) -> int | None:
        """Bytes per second over the last seconds; None when nothing can be said."""
        if processed < self._marks[-1][1]:
            self._marks.clear()  # a round that began anew
        while len(self._marks) > 1 and self._marks[1][0] <= now - SPEED_OVER:
            self._marks.popleft()
        begun, before = self._marks[0] if self._marks else (now, processed)
        self._marks.append((now, processed))
        return int((processed - before) / (now - begun)) if now > begun else None
