"""Telling often enough, and not more often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL = 1.0
"""Seconds between two calls, at least."""


class Pace:
    """Calls `tell` once there is something new: at once, or as soon as the last call is long enough ago."""

    def __init__(self, tell: Callable[[], None], interval: float = INTERVAL) -> None:
        self._tell = tell
        self._interval = interval
        self._next = float("-inf")
        self._waiting: asyncio.TimerHandle | None = None
        self._closed = False

    def new(self) -> None:
        """There is something new."""
        if self._closed or self._waiting is not None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._next:
            self._call()
        else:
            self._waiting = loop.call_at(self._next, self._call)

    def close(self) -> None:
        """There is nothing to tell any more."""
        self._closed = True
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _call(self) -> None:
        self._waiting = None
        self._next = asyncio.get_running_loop().time() + self._interval
        self._tell()
