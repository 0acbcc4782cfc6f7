"""The data relay: where two nodes meet that cannot reach each other. Bytes go through both ways in constant memory.

Each node puts one stream and gets one. The nodes make sure by themselves that all arrived (their own frames go through
here): when one of the four connections breaks, the others are broken too, and both nodes come again with the same
tokens. These are derived from names, so that they are the same after a restart of the controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from common.errors import Cancelled, DeadlinePassed, Stale, Unauthorized, VzfleetError

CAPACITY = 1024 * 1024
"""Bytes that wait in one direction at most, or one chunk if that is larger."""
IDLE_TIMEOUT = 120.0
"""Seconds that one side waits for the other."""


class Stream:
    """One direction. It has an explicit end; whatever else happens on one side reaches the other as an error."""

    def __init__(self, capacity: int = CAPACITY, idle_timeout: float = IDLE_TIMEOUT) -> None:
        self.sent = 0
        self._capacity = capacity
        self._idle_timeout = idle_timeout
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self._ended = False
        self._complete = False
        self._error: VzfleetError | None = None
        self._changed = asyncio.Event()

    @property
    def complete(self) -> bool:
        """Whether the sender has ended the stream and the receiver has taken all of it."""
        return self._complete

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self._error is not None

    def fail(self, error: VzfleetError) -> None:
        """End it for both sides with an error, unless it is complete or has failed already."""
        if not self._complete and self._error is None:
            self._error = error
            self._chunks.clear()
            self._waiting = 0
            self._changed.set()

    async def put(self, chunk: bytes) -> None:
        """Give bytes to the receiver; waits for room."""
        await self._until(lambda: not self._waiting or self._waiting + len(chunk) <= self._capacity)
        if chunk:
            self._chunks.append(chunk)
            self._waiting += len(chunk)
            self.sent += len(chunk)
            self._changed.set()

    async def end(self) -> None:
        """Say that all was sent; waits until the receiver has taken it."""
        self._check()
        self._ended = True
        self._changed.set()
        await self._until(lambda: self._complete)

    async def take(self) -> bytes | None:
        """The next bytes for the receiver; None at the end."""
        await self._until(lambda: bool(self._chunks) or self._ended)
        if not self._chunks:
            self._complete = True
            self._changed.set()
            return None
        chunk = self._chunks.popleft()
        self._waiting -= len(chunk)
        self._changed.set()
        return chunk

    def _check(self) -> None:
        if self._error is not None:
            # A new object each time: one exception must not collect the tracebacks of two tasks.
            raise type(self._error)(self._error.text)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; every change wakes both sides. Raises the stream's error."""
        self._check()
        try:
            while not condition():
                self._changed.clear()
                async with asyncio.timeout(self._idle_timeout):
                    await self._changed.wait()
                self._check()
        except TimeoutError:
            self.fail(DeadlinePassed(f"the other side of the transfer was idle for {self._idle_timeout:g} s"))
            self._check()


@dataclass(frozen=True)
class Tokens:
    """What one end shows to put its stream, and to get the other's."""

    put: str
    get: str


@dataclass
class Meeting:
    """One coming together of both ends: a stream each way, and the tokens that were used for it."""

    streams: dict[str, Stream]
    """By token; a stream has two."""
    used: set[str] = field(default_factory=set)

    @property
    def over(self) -> bool:
        """Whether one direction broke."""
        return any(stream.failed for stream in self.streams.values())

    def fail(self, error: VzfleetError) -> None:
        """End both directions."""
        for stream in self.streams.values():
            stream.fail(error)


@dataclass
class Way:
    """A way between two nodes that is open at the relay: the tokens of the source and of the target."""

    name: str
    source: Tokens
    target: Tokens
    meeting: Meeting | None = None

    @property
    def tokens(self) -> tuple[str, str, str, str]:
        """All four."""
        return self.source.put, self.source.get, self.target.put, self.target.get


class Side:
    """One connection's end of a stream. When it is left before the stream's end, the whole meeting breaks."""

    def __init__(self, meeting: Meeting, stream: Stream, name: str) -> None:
        self._meeting = meeting
        self._stream = stream
        self._name = name

    def abort(self, reason: str) -> None:
        """The connection broke: all of the meeting get Cancelled with this reason, unless this stream is complete."""
        if not self._stream.complete:
            self._meeting.fail(Cancelled(f"the {self._name} ended the transfer: {reason}"))

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A side that is cancelled while it waits takes the others with it."""
        try:
            yield
        except asyncio.CancelledError:
            self.abort("it was stopped")
            raise
        except DeadlinePassed as error:
            self._meeting.fail(error)
            raise


class Sender(Side):
    """Puts bytes."""

    def __init__(self, meeting: Meeting, stream: Stream) -> None:
        super().__init__(meeting, stream, "sender")

    async def write(self, chunk: bytes) -> None:
        """Hand bytes over; waits while the receiver is slower. Raises what ended the meeting."""
        with self._failing():
            await self._stream.put(chunk)

    async def finish(self) -> int:
        """All is sent: waits until the receiver has taken it, and gives the bytes. Raises what ended the meeting."""
        with self._failing():
            await self._stream.end()
        return self._stream.sent


class Receiver(Side):
    """Gets bytes: iterate over it. As a context manager it aborts when left before the end."""

    def __init__(self, meeting: Meeting, stream: Stream) -> None:
        super().__init__(meeting, stream, "receiver")

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        with self._failing():
            chunk = await self._stream.take()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def __aenter__(self) -> Receiver:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.abort("it left before the end")


class Relay:
    """All ways that are open. `key` is what tokens are derived from; `capacity` (bytes) and `idle_timeout` (seconds)
    hold for each direction of each of them."""

    def __init__(
        self, key: bytes | None = None, *, capacity: int = CAPACITY, idle_timeout: float = IDLE_TIMEOUT
    ) -> None:
        self._key = key or secrets.token_bytes(32)
        self._capacity = capacity
        self._idle_timeout = idle_timeout
        self._ways: dict[str, Way] = {}

    @property
    def open_ways(self) -> list[str]:
        """The names of the ways that are open."""
        return list(self._ways)

    def open(self, name: str) -> Way:
        """The way of this name; opened, unless it is already. Its tokens depend on the key and the name alone."""
        way = self._ways.get(name)
        if way is None:
            source = Tokens(self._token(name, "source put"), self._token(name, "source get"))
            target = Tokens(self._token(name, "target put"), self._token(name, "target get"))
            way = self._ways[name] = Way(name, source, target)
        return way

    def close(self, name: str) -> None:
        """Forget a way; who is on it gets Cancelled. Absent is success."""
        way = self._ways.pop(name, None)
        if way is not None and way.meeting is not None:
            way.meeting.fail(Cancelled("the transfer was closed"))

    def sender(self, token: str) -> Sender:
        """Begin to put. Raises Unauthorized for an unknown token."""
        return Sender(*self._use(token, putting=True))

    def receiver(self, token: str) -> Receiver:
        """Begin to get. Raises Unauthorized for an unknown token."""
        return Receiver(*self._use(token, putting=False))

    def _token(self, name: str, use: str) -> str:
        return hmac.new(self._key, f"{use} {name}".encode(), hashlib.sha256).hexdigest()

    def _use(self, token: str, putting: bool) -> tuple[Meeting, Stream]:
        for way in self._ways.values():
            puts = (way.source.put, way.target.put)
            for known in way.tokens:
                same = hmac.compare_digest(known.encode(), token.encode(errors="replace"))
                if same and (known in puts) is putting:
                    meeting = self._meeting(way, known)
                    meeting.used.add(known)
                    return meeting, meeting.streams[known]
        raise Unauthorized("the transfer's token is unknown")

    def _meeting(self, way: Way, token: str) -> Meeting:
        """The meeting that is going on, or a new one: an end that comes again has lost its connections of before."""
        meeting = way.meeting
        if meeting is None or meeting.over or token in meeting.used:
            if meeting is not None:
                meeting.fail(Stale("the other end has come anew"))
            there, back = (Stream(self._capacity, self._idle_timeout) for _ in range(2))
            streams = {way.source.put: there, way.target.get: there, way.target.put: back, way.source.get: back}
            meeting = way.meeting = Meeting(streams)
        return meeting
