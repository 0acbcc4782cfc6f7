"""The data relay: one sender and one receiver of a container's data meet here, and bytes go through in constant memory.

A stream has an explicit end. Whatever else happens on one side (abort, idle time-out, a new attempt) reaches the other
as an error, so that a truncated stream never looks complete. An HTTP handler that serves a receiver must then break
the connection without the terminating chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType

from common.errors import Cancelled, DeadlinePassed, Stale, Unauthorized, VzfleetError

CAPACITY = 4 * 1024 * 1024
"""Bytes that wait in a transfer at most, or one chunk if that is larger."""
IDLE_TIMEOUT = 120.0
"""Seconds that one side waits for the other."""
ReportBytes = Callable[[int], None]
"""Called with the bytes that the receiver has taken so far."""


class Transfer:
    """One attempt to hand over a container's data, made by `Relay.open`. `send` and `receive` are the two tokens."""

    def __init__(self, name: str, capacity: int, idle_timeout: float, progress: ReportBytes | None) -> None:
        self.name = name
        self.send = secrets.token_urlsafe(32)
        self.receive = secrets.token_urlsafe(32)
        self.sent = 0
        self.received = 0
        self._capacity = capacity
        self._idle_timeout = idle_timeout
        self._progress = progress
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
        self.received += len(chunk)
        self._changed.set()
        if self._progress is not None:
            self._progress(self.received)
        return chunk

    def _check(self) -> None:
        if self._error is not None:
            # A new object each time: one exception must not collect the tracebacks of two tasks.
            raise type(self._error)(self._error.text)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; every change wakes both sides. Raises the transfer's error."""
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


class Sender:
    """The sending side. As a context manager it aborts the transfer when it is left before `finish`."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    async def write(self, chunk: bytes) -> None:
        """Hand bytes over; waits while the receiver is slower. Raises what ended the transfer."""
        with _failing(self._transfer, "the sender was stopped"):
            await self._transfer.put(chunk)

    async def finish(self) -> int:
        """All is sent: waits until the receiver has taken it, and gives the bytes. Raises what ended the transfer."""
        with _failing(self._transfer, "the sender was stopped"):
            await self._transfer.end()
        return self._transfer.sent

    def abort(self, reason: str) -> None:
        """The data will not be complete: the receiver gets Cancelled with this reason."""
        self._transfer.fail(Cancelled(f"the sender ended the transfer: {reason}"))

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.abort(_reason(error, "it did not end its data"))


class Receiver:
    """The receiving side: iterate over it. As a context manager it aborts the transfer when left before the end."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        with _failing(self._transfer, "the receiver was stopped"):
            chunk = await self._transfer.take()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def abort(self, reason: str) -> None:
        """The data cannot be used: the sender gets Cancelled with this reason."""
        self._transfer.fail(Cancelled(f"the receiver ended the transfer: {reason}"))

    async def __aenter__(self) -> Receiver:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.abort(_reason(error, "it left before the end"))


class Relay:
    """All transfers that are open. `capacity` in bytes and `idle_timeout` in seconds hold for each of them."""

    def __init__(self, capacity: int = CAPACITY, idle_timeout: float = IDLE_TIMEOUT) -> None:
        self._capacity = capacity
        self._idle_timeout = idle_timeout
        self._transfers: dict[str, Transfer] = {}
        self._unused: dict[str, tuple[Transfer, bool]] = {}

    def open(self, transfer: str, progress: ReportBytes | None = None) -> Transfer:
        """A new attempt with new tokens, each good for one use. An older one of this name ends with Stale."""
        self._forget(transfer, Stale("the transfer was begun anew"))
        opened = Transfer(transfer, self._capacity, self._idle_timeout, progress)
        self._transfers[transfer] = opened
        self._unused[opened.send] = (opened, True)
        self._unused[opened.receive] = (opened, False)
        return opened

    def close(self, transfer: str) -> None:
        """Forget a transfer; if it is not complete, both sides get Cancelled. Absent is success."""
        self._forget(transfer, Cancelled("the transfer was closed"))

    def sender(self, token: str) -> Sender:
        """Use up a send token. Raises Unauthorized for any other, or a used one."""
        return Sender(self._use(token, sending=True))

    def receive(self, token: str) -> Receiver:
        """Use up a receive token; its bytes come by iterating. Raises Unauthorized for any other, or a used one."""
        return Receiver(self._use(token, sending=False))

    async def send(self, token: str, chunks: AsyncIterator[bytes]) -> int:
        """Send a whole stream; gives its bytes once the receiver has them all. What `chunks` raises aborts it."""
        async with self.sender(token) as sender:
            async for chunk in chunks:
                await sender.write(chunk)
            return await sender.finish()

    def _use(self, token: str, sending: bool) -> Transfer:
        for known, (transfer, sends) in self._unused.items():
            if sends is sending and hmac.compare_digest(known.encode(), token.encode(errors="replace")):
                del self._unused[known]
                return transfer
        raise Unauthorized("the transfer's token is unknown or was used already")

    def _forget(self, name: str, error: VzfleetError) -> None:
        transfer = self._transfers.pop(name, None)
        if transfer is not None:
            self._unused.pop(transfer.send, None)
            self._unused.pop(transfer.receive, None)
            transfer.fail(error)


@contextlib.contextmanager
def _failing(transfer: Transfer, reason: str) -> Iterator[None]:
    """A side that is cancelled while it waits takes the other side with it."""
    try:
        yield
    except asyncio.CancelledError:
        transfer.fail(Cancelled(reason))
        raise


def _reason(error: BaseException | None, otherwise: str) -> str:
    return str(error)[:200] or type(error).__name__ if error is not None else otherwise
