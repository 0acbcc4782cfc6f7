"""Counts what is thrown away, and says so now and then instead of each time."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from common.clock import Clock

log = logging.getLogger(__name__)
_QUIET = 10.0


class Drops:
    """Dropped messages by reason. Each reason is logged at once and then at most every ten seconds."""

    def __init__(self, clock: Clock) -> None:
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._logged: dict[str, float] = {}

    def count(self, reason: str, *, failure: BaseException | None = None, **facts: Any) -> None:
        """Note one. `reason` is one of a fixed few, `facts` go to the log, as does the traceback of a `failure`."""
        self.counts[reason] += 1
        now = self._clock.monotonic()
        if now - self._logged.get(reason, -_QUIET) < _QUIET:
            return
        self._logged[reason] = now
        level = logging.WARNING if failure is None else logging.ERROR
        extra = {"reason": reason, "dropped": self.counts[reason], **facts}
        log.log(level, "dropped a message", extra=extra, exc_info=failure)
