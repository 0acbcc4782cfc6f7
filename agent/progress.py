"""How far a command is, told to the controller at most twice a second."""

from __future__ import annotations

from collections.abc import Callable

from common.clock import Clock
from common.messages import Progress

INTERVAL = 0.5


class ProgressReporter:
    """Sends Progress of one command. Callable as the drivers' `ReportProgress`."""

    def __init__(self, command: str, clock: Clock, send: Callable[[Progress], None]) -> None:
        self._command = command
        self._clock = clock
        self._send = send
        self._begun = clock.monotonic()
        self._last = float("-inf")

    def __call__(self, stage: str, percent: int | None = None) -> None:
        """Tell the stage and the percentage (None: not known)."""
        self._tell(stage, percent, None)

    def transferred(self, stage: str, processed: int, total: int | None = None) -> None:
        """Tell how many bytes are through, of how many as far as that is known."""
        percent = min(100, processed * 100 // total) if total else None
        self._tell(stage, percent, processed)

    def _tell(self, stage: str, percent: int | None, processed: int | None) -> None:
        now = self._clock.monotonic()
        if now - self._last < INTERVAL:
            return
        self._last = now
        elapsed = now - self._begun
        speed = int(processed / elapsed) if processed is not None and elapsed > 0 else None
        self._send(Progress(self._command, stage[:128], percent, processed, speed))
