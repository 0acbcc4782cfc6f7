"""What happened without a row being written, on its way to the log of events: in order, never waited for, bounded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from itertools import count, islice
from typing import Any, TypeVar

from common.errors import NoSpace, Unavailable, VzfleetError
from common.tasks import Tasks
from controller.records import Event
from controller.store import events as rows
from controller.store.db import Database, Transaction
from controller.store.telling import draft

log = logging.getLogger(__name__)
MAX_WAITING = 10_000
BATCH = 256
RETRY_DELAY = 1.0
LAST_TRY = 2.0
_Key = tuple[str, str, int]


class Notes:
    """A queue of notes. While the store refuses writes, a later one takes the place of an earlier one like it."""

    def __init__(self, store: Database, tasks: Tasks, retry_delay: float = RETRY_DELAY) -> None:
        self._store = store
        self._tasks = tasks
        self._retry_delay = retry_delay
        self._waiting: dict[_Key, Event] = {}
        self._numbers = count(1)
        self._refused = False
        self._lost = 0
        self._writer: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> list[Event]:
        """Those that are not written yet, in order."""
        return list(self._waiting.values())

    def add(
        self,
        action: str,
        source: str,
        *,
        container: str | None = None,
        node: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Queue a note."""
        # Some names come from the nodes, and may be anything.
        source, container, node = _fit(source, 255), _fit(container, 64), _fit(node, 63)
        key = (action, source, 0 if self._refused else next(self._numbers))
        self._waiting.pop(key, None)
        self._waiting[key] = draft(action, source, container=container, node=node, context=details)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.pop(next(iter(self._waiting)))
            self._lost += 1
        if self._writer is None or self._writer.done():
            self._writer = self._tasks.start(self._write(), "notes")

    async def close(self) -> None:
        """Write what waits, if the store takes it soon."""
        if self._writer is not None and not self._writer.done():
            await asyncio.wait({self._writer}, timeout=LAST_TRY)

    async def _write(self) -> None:
        together = BATCH
        while self._waiting:
            batch = dict(islice(self._waiting.items(), together))
            try:
                await self._store.write(partial(_tell, events=list(batch.values())))
            except (NoSpace, Unavailable) as error:
                await self._hold(error)
                continue
            except VzfleetError as error:
                if len(batch) > 1:
                    together = 1  # one of them cannot be written: the others can
                    continue
                log.error("a note could not be written", extra={"reason": error.text})
            if self._lost:
                log.error("notes were lost: too many waited for the store", extra={"notes": self._lost})
            self._refused, self._lost = False, 0
            self._waiting = {key: event for key, event in self._waiting.items() if batch.get(key) is not event}

    async def _hold(self, error: VzfleetError) -> None:
        """Keep the last note of each kind until the store takes writes again."""
        if not self._refused:
            log.error("notes wait for the store", extra={"reason": error.text, "notes": len(self._waiting)})
        self._refused = True
        newest: dict[_Key, Event] = {}
        for (action, source, _), event in self._waiting.items():
            newest.pop((action, source, 0), None)
            newest[action, source, 0] = event
        self._waiting = newest
        await asyncio.sleep(self._retry_delay)


T = TypeVar("T", str, str | None)


def _fit(text: T, size: int) -> T:
    """What a column of that size can hold."""
    return None if text is None else text.replace("\0", "\N{REPLACEMENT CHARACTER}")[:size]


def _tell(transaction: Transaction, events: list[Event]) -> None:
    for event in events:
        rows.tell(transaction, event)
