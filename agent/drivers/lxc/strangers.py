"""Containers in the node's LXC path that no controller made: what they are, and news of them without being asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from agent.drivers.base import StateListener
from agent.drivers.lxc import commands
from agent.drivers.lxc.records import Records
from common.errors import VzfleetError
from common.reports import ContainerReport
from common.states import Status
from common.tasks import Tasks

log = logging.getLogger(__name__)
TICK = 1.0
"""Seconds between two looks. One that finds nothing new lists a directory, and starts no process."""
_STATES = {"RUNNING": Status.RUNNING, "STOPPED": Status.STOPPED, "FROZEN": Status.FROZEN}


@dataclass(frozen=True)
class _Seen:
    """What was told of a container, and when its configuration had been written then: `lxc-create` writes it late."""

    report: ContainerReport
    written: int | None


class Strangers:
    """The containers made by hand. `busy` says whether a command of ours works on a container of that id."""

    def __init__(self, records: Records, busy: Callable[[str], bool], listener: StateListener) -> None:
        self._records = records
        self._busy = busy
        self._listener = listener
        self._told: dict[str, _Seen] = {}
        self._tasks = Tasks("strangers")

    def open(self) -> None:
        """From now on `listener` hears of those that come, go, or get another configuration."""
        self._tasks.start(self._look_around(), "look around")

    async def close(self) -> None:
        """Listen no more."""
        await self._tasks.close()

    async def all(self) -> list[ContainerReport]:
        """All that are there now, each with the state that LXC tells. Raises DeadlinePassed."""
        self._told = {name: await self._inspect(name) for name in sorted(self._names())}
        return [seen.report for seen in self._told.values()]

    def _names(self) -> set[str]:
        return self._records.on_disk() - self._records.all().keys()

    async def _look_around(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                await self._look()
            except (VzfleetError, OSError) as error:
                log.warning("a container made by hand cannot be looked at", extra={"reason": str(error)})

    async def _look(self) -> None:
        names = self._names()
        for name in self._told.keys() - names:
            self._listener(self._told.pop(name).report, True)
        for name in sorted(name for name in names if not self._busy(name)):
            known = self._told.get(name)
            if known is None or known.written != self._written(name):
                seen = await self._inspect(name)
                self._told[name] = seen
                self._listener(seen.report, False)

    async def _inspect(self, name: str) -> _Seen:
        written = self._written(name)
        state = await commands.state(self._records.directory, name)
        return _Seen(ContainerReport(name, 0, _STATES.get(state, Status.ERROR)), written)

    def _written(self, name: str) -> int | None:
        """When its configuration was last written, None while there is none."""
        try:
            return (self._records.path(name) / "config").stat().st_mtime_ns
        except OSError:
            return None
