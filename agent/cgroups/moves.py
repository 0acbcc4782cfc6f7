"""Having the kernel ready for moving processes between cgroups, as every start and end of a container does.

A move takes a lock for which the kernel waits 8-20 ms (a grace period of RCU, measured), unless it was held just
before. So we take it as soon as a move is to come, and that wait goes on beside all that leads up to the move.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path


class Moves:
    """Takes the kernel's lock ahead of time. `own` is the cgroup that the agent itself is in, None when unknown."""

    def __init__(self, own: Path | None) -> None:
        self._own = own
        self._taking: asyncio.Future[None] | None = None

    def expect(self) -> None:
        """Processes will be moved soon. Returns at once; nothing depends on it."""
        if self._own is not None and (self._taking is None or self._taking.done()):
            self._taking = asyncio.get_running_loop().run_in_executor(None, self._take, self._own)

    async def prepared(self) -> None:
        """Wait until what `expect` began has ended."""
        if self._taking is not None:
            await asyncio.wait({self._taking})

    def _take(self, own: Path) -> None:
        # We are moved to where we are ("0" is the writer, cgroups(7)). Refused, the next move is just slower.
        with contextlib.suppress(OSError):
            (own / "cgroup.procs").write_text("0", encoding="ascii")
