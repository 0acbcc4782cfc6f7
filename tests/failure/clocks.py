"""Processes whose wall clock can be set while they run; their monotonic clocks stay true.

A hook of Python's start (sitecustomize) puts it in place of the machine's. (libfaketime cannot be used: with a true
monotonic clock it breaks sleeping and waiting of CPython 3.11.)
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

HOUR, DAY = 3600.0, 86400.0
_HOOK = """
import os, sys
sys.path.insert(0, os.getcwd())
import json, time, datetime, common.clock

real = time.time
stamp, setting = None, (0.0, 1.0, real())

def now():
    global stamp, setting
    found = os.stat(os.environ["VZFLEET_CLOCK"]).st_mtime_ns
    if found != stamp:
        with open(os.environ["VZFLEET_CLOCK"]) as file:
            stamp, setting = found, (*json.load(file), real())
    ahead, speed, since = setting
    return since + ahead + (real() - since) * speed

time.time = now
time.time_ns = lambda: int(now() * 1e9)
common.clock.SystemClock.now = lambda self: datetime.datetime.fromtimestamp(now(), datetime.UTC)
if os.environ.get("VZFLEET_LIFETIMES_BY_THE_WALL"):
    common.clock.SteadyClock.now = lambda self: self._clock.now()
"""


class FakeClock:
    """The wall clock of one process, kept in a file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / f"clock-{secrets.token_hex(4)}"
        self._directory.mkdir()
        (self._directory / "sitecustomize.py").write_text(_HOOK)
        self.set(0)

    def set(self, ahead: float, speed: float = 1.0) -> None:
        """Be ahead of the true time by so many seconds (negative: behind), and run at this speed from then on."""
        temporary = self._directory / "new"
        temporary.write_text(json.dumps([ahead, speed]))
        temporary.replace(self._directory / "setting")

    def environment(self) -> dict[str, str]:
        """For the process."""
        return {"PYTHONPATH": str(self._directory), "VZFLEET_CLOCK": str(self._directory / "setting")}
