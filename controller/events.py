"""The bus of events: what was committed, in its order, to those who listen; and the figures they asked for.

A subscription is a place in one common order of events. The last ones are kept in memory once for all; who is further
behind reads the table, page by page, at his own pace, so that there is neither gap nor repetition between the two. Who
has let more events pass than are kept, and takes no more, is dropped: he resumes with the number of his last event.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from common.errors import Unavailable
from common.tasks import Tasks
from controller.notes import Notes
from controller.records import Event, Operation
from controller.store import events as rows
from controller.store.db import Database
from controller.subscriptions import Kept, Renderer, Subscription, Wants

KEPT = 1000
KEPT_BYTES = 16 * 2**20
PAGE = 200
MAX_SUBSCRIBERS = 500
LEAVE_TIME = 2.0
GOING_AWAY = 1001
"""Close code of websockets (RFC 6455, 7.4.1)."""


class Events:
    """The bus. All of it runs on the event loop."""

    def __init__(self, store: Database, *, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        self._store = store
        self._kept_at_most = kept
        self._kept_bytes = kept_bytes
        self._kept: deque[Kept] = deque()
        self._size = 0
        self.latest = 0
        """The number of the last event that was told."""
        self.subscriptions: set[Subscription] = set()
        self.tasks = Tasks("events")
        self.notes = Notes(store, self.tasks)
        self._closed = False

    async def open(self) -> None:
        """Go on after the last event in the store."""
        self.latest = max(self.latest, await self._store.read(rows.latest))

    async def close(self) -> None:
        """Write the notes that wait, and have all subscribers leave."""
        self._closed = True
        await self.notes.close()
        for subscription in list(self.subscriptions):
            subscription.end(GOING_AWAY, f"the controller stops; resume with since={subscription.position}")
        leaving = [subscription.left for subscription in self.subscriptions]
        if leaving:
            await asyncio.wait(leaving, timeout=LEAVE_TIME)
        await self.tasks.close()

    # ------------------------------------------------------------ what is told

    def publish(self, events: Sequence[Event]) -> None:
        """Tell what was committed, in the order of its numbers."""
        for event in events:
            if event.sequence != self.latest + 1:
                self._forget_all()
            self.latest = event.sequence
            if self.subscriptions:
                self._keep(event)
        if not self.subscriptions:
            self._forget_all()
        for subscription in list(self.subscriptions):
            subscription.told(self._first)

    def note(
        self,
        action: str,
        source: str,
        *,
        container: str | None = None,
        node: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell what happened without a row being written: written and told in order, soon, without waiting.

        `details` becomes `context` of the event. While the store refuses writes the last note for each action and
        source waits, a bounded number of them.
        """
        self.notes.add(action, source, container=container, node=node, details=details)

    def sampled(self, containers: Collection[str]) -> None:
        """There are new figures of these containers."""
        for subscription in self.subscriptions:
            subscription.sampled(containers)

    def progressed(self, operation: Operation) -> None:
        """An operation is further within its step: told to those who listen, and never written."""
        for subscription in self.subscriptions:
            subscription.progressed(operation)

    def _keep(self, event: Event) -> None:
        size = len(msgspec.json.encode(event.body))
        self._kept.append(Kept(event, size))
        self._size += size
        while len(self._kept) > self._kept_at_most or (self._size > self._kept_bytes and len(self._kept) > 1):
            self._size -= self._kept.popleft().size

    def _forget_all(self) -> None:
        self._kept.clear()
        self._size = 0

    @property
    def kept(self) -> int:
        """How many events are in memory."""
        return len(self._kept)

    @property
    def _first(self) -> int:
        """The first number that is in memory, or will be."""
        return self._kept[0].event.sequence if self._kept else self.latest + 1

    # ------------------------------------------------------------ who listens

    def require_room(self) -> None:
        """Raise Unavailable when nobody more is let in."""
        if self._closed or len(self.subscriptions) >= MAX_SUBSCRIBERS:
            raise Unavailable(f"{len(self.subscriptions)} clients listen to events already; try again later")

    def subscribe(
        self, wants: Wants, since: int, renderer: Renderer, on_end: Callable[[int, str], None]
    ) -> Subscription:
        """Listen from the event after `since` on. `on_end` hears a close code and why."""
        subscription = Subscription(self, wants, since, renderer, on_end)
        self.subscriptions.add(subscription)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """Listen no more."""
        self.subscriptions.discard(subscription)
        if not self.subscriptions:
            self._forget_all()

    def after(self, position: int) -> Iterable[Kept] | None:
        """The events after that one which are in memory; None when the next one is not."""
        skipped = position + 1 - self._first
        return None if skipped < 0 else islice(self._kept, skipped, None)

    async def page(self, position: int) -> list[Event]:
        """The events after that one, from the table."""
        return await self._store.read(lambda connection: rows.page(connection, position, PAGE))

    async def is_ahead(self, position: int) -> bool:
        """Whether no event had that number yet, though one may just have been written."""
        return position > self.latest and position > await self._store.read(rows.latest)
