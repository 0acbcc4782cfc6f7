"""Events: numbered and written in the transaction of what they tell, read in pages, pruned in small batches.

The numbers go up by one without a gap, across restarts: the last event is never pruned. The event which says that
commits were lost leaps over the numbers that they may have had, so that no number stands for two events.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, delete, func, insert, select

from common.clock import Clock, timestamp
from controller.records import Change, Event
from controller.store import models
from controller.store.db import Transaction
from controller.store.rows import Rows
from controller.store.telling import derive

_table = models.events
_rows = Rows(_table, Event, "sequence")
RESTORED = "controller-restored"
"""The action of the event which says that commits were lost, or an older database was put in place."""
LEAP = 2**32
"""More numbers than lost commits can have had; a client that counts in doubles is exact over two million leaps."""


class EventLog:
    """Writes the events of each transaction. Belongs to the writer's thread (`controller.store.db.Chronicle`)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = 0

    def open(self, connection: Connection) -> None:
        """Go on after the last number that was given."""
        self._last = latest(connection)

    def derive(self, changes: Sequence[Change]) -> list[Event]:
        """What is to be told of one transaction."""
        return derive(changes)

    def write(self, connection: Connection, drafts: Sequence[Event]) -> list[Event]:
        """Number events and write them, in the transaction under way."""
        now, last = timestamp(self._clock.now()), self._last
        numbered: list[Event] = []
        for event in drafts:
            last += LEAP if event.action == RESTORED else 1
            numbered.append(msgspec.structs.replace(event, sequence=last, at=now))
        if numbered:
            connection.execute(insert(_table), [msgspec.to_builtins(event) for event in numbered])
        return numbered

    def committed(self, events: Sequence[Event]) -> None:
        """The transaction of these events is durable: their numbers are used."""
        if events:
            self._last = events[-1].sequence


def tell(transaction: Transaction, event: Event) -> None:
    """Have an event (`controller.store.telling.draft`) written with this transaction."""
    transaction.changed(Event, event.source, event)


def latest(connection: Connection) -> int:
    """The number of the last event; 0 when there never was one."""
    number: int | None = connection.execute(select(func.max(_table.c.sequence))).scalar()
    return number or 0


def page(connection: Connection, after: int, limit: int) -> list[Event]:
    """The first events after that number, in order. The caller looks whether the first is the next one."""
    query = select(_table).where(_table.c.sequence > after).order_by(_table.c.sequence).limit(limit)
    return [_rows.decode(row) for row in connection.execute(query)]


def prune(transaction: Transaction, before: str, keep: int, limit: int = 500) -> int:
    """Forget a small batch of the oldest events: what came before then, and all but the last `keep`.

    Returns how many; never the last one, from which the numbers go on.
    """
    last = latest(transaction.connection)
    query = select(_table.c.sequence, _table.c.at).where(_table.c.sequence < last)
    oldest = transaction.connection.execute(query.order_by(_table.c.sequence).limit(limit)).all()
    end = 0
    for sequence, at in oldest:
        if at >= before and sequence > last - keep:
            break
        end = sequence
    if end == 0:
        return 0
    return transaction.connection.execute(delete(_table).where(_table.c.sequence <= end)).rowcount
