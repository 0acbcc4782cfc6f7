"""One who listens to events: a place in their order, what is handed to it next, and when it is too slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from controller.records import Event, EventType, Operation

PAGE_BYTES = 2**20
CHUNK = 64 * 1024
"""Bytes that a subscriber is given at once, and one event at least."""
TRY_AGAIN_LATER = 1013
"""Close code of websockets (IANA's registry)."""


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


class Renderer(Protocol):
    """How events, resyncs and figures look to subscribers, as bytes to be sent."""

    def event(self, event: Event) -> bytes:
        """A sequenced frame."""
        ...

    def resync(self, resync: Resync) -> bytes:
        """A frame that says that events are missing."""
        ...

    def metric(self, container: str) -> bytes:
        """A container's present figures; nothing if it has none."""
        ...

    def progress(self, operation: str) -> bytes:
        """How far an operation is now; nothing if it has ended."""
        ...


@dataclass
class Kept:
    """An event in memory, rendered when the first one asks."""

    event: Event
    size: int
    frame: bytes | None = None


class Source(Protocol):
    """Where subscriptions take events from: `controller.events.Events`. `latest` is the number of the last one told."""

    latest: int

    def after(self, position: int) -> Iterable[Kept] | None:
        """The events after that one which are in memory; None when the next one is not."""
        ...

    async def page(self, position: int) -> list[Event]:
        """The first events after that one in the table."""
        ...

    async def is_ahead(self, position: int) -> bool:
        """Whether no event ever had that number."""
        ...

    def leave(self, subscription: Subscription) -> None:
        """It listens no more."""
        ...


@dataclass(eq=False)
class Subscription:
    """One subscriber. `position` is the last event that was handed to it, or left out because it asked for others.

    `sending` is set by its user while the client's connection takes no more.
    """

    events: Source
    wants: Wants
    position: int
    renderer: Renderer
    on_end: Callable[[int, str], None]
    sending: bool = False
    left: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _caught_up: bool = False
    ended: bool = False
    _checked: bool = False
    _dirty: dict[str, None] = field(default_factory=dict)
    _progressed: dict[str, None] = field(default_factory=dict)
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

    def progressed(self, operation: Operation) -> None:
        """An operation is further: how far it is when this one takes the next frames is sent, and nothing before."""
        wants = self.wants
        if EventType.OPERATION in wants.types and (wants.container is None or wants.container in operation.containers):
            self._progressed[operation.id] = None
            self._wake.set()

    def end(self, code: int, reason: str) -> None:
        """Have it closed, for a reason. Only the first one counts."""
        if not self.ended:
            self.ended = True
            self.on_end(code, reason)

    def leave(self) -> None:
        """Its client is gone."""
        self.ended = True
        self.events.leave(self)
        if not self.left.done():
            self.left.set_result(None)

    async def next(self) -> bytes:
        """What is to be sent next; waits until there is something. Raises Unavailable when the store cannot be read."""
        while True:
            self._wake.clear()
            parts = await self._next_events()
            parts += self._next_metrics()
            parts += self._next_progress()
            if parts:
                return b"".join(parts)
            if self.position >= self.events.latest and not self._dirty and not self._progressed:
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
            self._pass(one.event)
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
            self._pass(event)
            if self.wants.has(event):
                parts.append(self.renderer.event(event))
                size += len(parts[-1])
        return parts

    def _pass(self, event: Event) -> None:
        """This event's turn has come; what an operation's says is newer than any progress before it."""
        self.position = event.sequence
        if event.type is EventType.OPERATION:
            self._progressed.pop(event.source.rpartition("/")[2], None)

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

    def _next_progress(self) -> list[bytes]:
        """Of operations whose events are all sent: an ended one tells nothing any more."""
        if self.position < self.events.latest:
            return []
        waiting, self._progressed = self._progressed, {}
        return [frame for frame in map(self.renderer.progress, waiting) if frame]
