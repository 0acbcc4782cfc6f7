"""The bus of events: what was committed, in its order, to those who listen; and the figures they asked for.

A subscription is a place in one common order of events. The last ones are kept in memory once for all; who is further
behind reads the table, page by page, at his own pace, so that there is neither gap nor repetition between the two. Who
has let more events pass than are kept, and takes no more, is dropped: he resumes with the number of his last event.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

from common.errors import Unavailable
from common.tasks import Tasks
from controller.notes import Notes
from controller.records import Event, EventType
from controller.store import events as rows
from controller.store.db import Database

log = logging.getLogger(__name__)
KEPT = 1000
KEPT_BYTES = 16 * 2**20
PAGE = 200
PAGE_BYTES = 2**20
CHUNK = 64 * 1024
"""Bytes that a subscriber is given at once, and one event at least."""
MAX_SUBSCRIBERS = 500
LEAVE_TIME = 2.0
GOING_AWAY, TRY_AGAIN_LATER = 1001, 1013
"""Close codes of websockets (RFC 6455, and IANA's registry for 1013)."""


@dataclass(frozen=True)
class Wants:
    """What a subscriber asks for: types of events, of one container or of all; figures of containers (None: all)."""

    types: Collection[EventType]
    container: str | None = None
    metrics: frozenset[str] | None = frozenset()

    def has(self, event: Event) -> bool:
        """Whether this event is asked for."""
        if event.type not in self.types:
            return False
        named: Collection[str] = event.body.get("containers", ())
        return self.container is None or event.container == self.container or self.container in named


@dataclass(frozen=True)
class Resync:
    """Events after `since` are not there any more: whoever asked must read everything anew, as of `sequence`."""

    since: int
    sequence: int


class Renderer:
    """How events, resyncs and figures look to subscribers, as bytes to be sent."""

    def event(self, event: Event) -> bytes:
        """A sequenced frame."""
        raise NotImplementedError

    def resync(self, resync: Resync) -> bytes:
        """A frame that says that events are missing."""
        raise NotImplementedError

    def metric(self, container: str) -> bytes:
        """A container's present figures; nothing if it has none."""
        raise NotImplementedError


@dataclass
class _Kept:
    """An event in memory, rendered when the first one asks."""

    event: Event
    size: int
    frame: bytes | None = None


class Events:
    """The bus. All of it runs on the event loop."""

    def __init__(self, store: Database, *, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        self._store = store
        self._kept_at_most = kept
        self._kept_bytes = kept_bytes
        self._kept: deque[_Kept] = deque()
        self._size = 0
        self.latest = 0
        """The number of the last event that was told."""
        self.subscriptions: set[Subscription] = set()
        self.tasks = Tasks("events")
        self._notes = Notes(store, self.tasks)
        self._closed = False

    async def open(self) -> None:
        """Go on after the last event in the store."""
        self.latest = max(self.latest, await self._store.read(rows.latest))

    async def close(self) -> None:
        """Write the notes that wait, and have all subscribers leave."""
        self._closed = True
        await self._notes.close()
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
        self._notes.add(action, source, container=container, node=node, details=details)

    def sampled(self, containers: Collection[str]) -> None:
        """There are new figures of these containers."""
        for subscription in self.subscriptions:
            subscription.sampled(containers)

    def _keep(self, event: Event) -> None:
        size = len(msgspec.json.encode(event.body))
        self._kept.append(_Kept(event, size))
        self._size += size
        while len(self._kept) > self._kept_at_most or (self._size > self._kept_bytes and len(self._kept) > 1):
            self._size -= self._kept.popleft().size

    def _forget_all(self) -> None:
        self._kept.clear()
        self._size = 0

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
        self, wants: Wants, since: int | None, renderer: Renderer, on_end: Callable[[int, str], None]
    ) -> Subscription:
        """Listen from the event after `since` on, or from now on. `on_end` hears a close code and why."""
        subscription = Subscription(self, wants, self.latest if since is None else since, renderer, on_end)
        self.subscriptions.add(subscription)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """Listen no more."""
        self.subscriptions.discard(subscription)
        if not self.subscriptions:
            self._forget_all()

    def after(self, position: int) -> Iterable[_Kept] | None:
        """The events after that one which are in memory; None when the next one is not."""
        skipped = position + 1 - self._first
        return None if skipped < 0 else islice(self._kept, skipped, None)

    async def page(self, position: int) -> list[Event]:
        """The events after that one, from the table."""
        return await self._store.read(lambda connection: rows.page(connection, position, PAGE))

    async def is_ahead(self, position: int) -> bool:
        """Whether no event had that number yet, though one may just have been written."""
        return position > self.latest and position > await self._store.read(rows.latest)


@dataclass(eq=False)
class Subscription:
    """One subscriber. `position` is the last event that was handed to it, or left out because it asked for others.

    `sending` is set by its user while the client's connection takes no more.
    """

    events: Events
    wants: Wants
    position: int
    renderer: Renderer
    on_end: Callable[[int, str], None]
    sending: bool = False
    left: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _caught_up: bool = False
    _checked: bool = False
    _ended: bool = False
    _dirty: dict[str, None] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def told(self, first: int) -> None:
        """Something was told; `first` is the oldest event in memory."""
        self._wake.set()
        if self.sending and self._caught_up and self.position < first - 1:
            self.end(TRY_AGAIN_LATER, f"too slow; resume with since={self.position}")

    def sampled(self, containers: Collection[str]) -> None:
        """There are new figures: what has not been sent yet is sent with the newest."""
        wanted = self.wants.metrics
        if wanted is None:
            self._dirty.update(dict.fromkeys(containers))
        elif wanted:
            self._dirty.update(dict.fromkeys(wanted.intersection(containers)))
        if self._dirty:
            self._wake.set()

    def end(self, code: int, reason: str) -> None:
        """Have it closed, for a reason. Only the first one counts."""
        if not self._ended:
            self._ended = True
            self.on_end(code, reason)

    def leave(self) -> None:
        """Its client is gone."""
        self._ended = True
        self.events.leave(self)
        if not self.left.done():
            self.left.set_result(None)

    async def next(self) -> bytes:
        """What is to be sent next; waits until there is something. Raises Unavailable when the store cannot be read."""
        while True:
            self._wake.clear()
            parts = await self._next_events()
            parts += self._next_metrics()
            if parts:
                return b"".join(parts)
            if self.position >= self.events.latest and not self._dirty:
                await self._wake.wait()

    async def _next_events(self) -> list[bytes]:
        if not self._checked:
            self._checked = True
            if await self.events.is_ahead(self.position):
                return [self._resync()]
        kept = self.events.after(self.position)
        if kept is None:
            return await self._next_page()
        self._caught_up = True
        parts: list[bytes] = []
        size = 0
        for one in kept:
            self.position = one.event.sequence
            if self.wants.has(one.event):
                one.frame = one.frame or self.renderer.event(one.event)
                parts.append(one.frame)
                size += len(one.frame)
                if size >= CHUNK:
                    break
        return parts

    async def _next_page(self) -> list[bytes]:
        """Events from the table; what is missing there was pruned, or lost with an older database."""
        page = await self.events.page(self.position)
        if not page or page[0].sequence != self.position + 1:
            return [self._resync()]
        parts: list[bytes] = []
        size = 0
        for event in page:
            if event.sequence > self.position + 1 or size > PAGE_BYTES:
                break
            self.position = event.sequence
            if self.wants.has(event):
                parts.append(self.renderer.event(event))
                size += len(parts[-1])
        return parts

    def _resync(self) -> bytes:
        missed = Resync(self.position, self.events.latest)
        self.position = missed.sequence
        return self.renderer.resync(missed)

    def _next_metrics(self) -> list[bytes]:
        parts: list[bytes] = []
        size = 0
        while self._dirty and size < CHUNK:
            container = next(iter(self._dirty))
            del self._dirty[container]
            frame = self.renderer.metric(container)
            parts.append(frame)
            size += len(frame)
        return [part for part in parts if part]
