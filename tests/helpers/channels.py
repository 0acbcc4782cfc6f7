"""Two joined ends of a way between nodes, in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from agent.channel.base import Restarted
from common.errors import Unavailable

T = TypeVar("T")
_PIECES = 2


class MemoryChannel:
    """One end (`agent.channel.base.Channel`). `cut_after`: so many bytes may be written here, then both are cut."""

    def __init__(self) -> None:
        self.other: MemoryChannel = self
        self.sent = 0
        self.cut_after: int | None = None
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(_PIECES)
        self._broken = asyncio.Event()
        self._error: Unavailable = Unavailable("the other end has given up")
        self._taken = asyncio.Event()
        self._ended = False

    async def write(self, data: bytes) -> None:
        assert data, "an empty piece would be the end"
        assert not self._ended, "nothing is written after the end"
        self.sent += len(data)
        if self.cut_after is not None and self.sent > self.cut_after:
            self.break_both(Restarted("the other end has begun anew"))
        await self._unless_broken(self.other._waiting.put(bytes(data)))

    async def end(self) -> None:
        self._ended = True
        await self._unless_broken(self.other._waiting.put(b""))
        await self._unless_broken(self.other._taken.wait())

    async def read(self) -> bytes:
        if self._taken.is_set():
            return b""
        data = await self._unless_broken(self._waiting.get())
        if not data:
            self._taken.set()
        return data

    def break_both(self, error: Unavailable) -> None:
        """Have every call at both ends raise this error from now on."""
        for end in (self, self.other):
            end._error = error
            end._broken.set()

    async def _unless_broken(self, work: Coroutine[Any, Any, T]) -> T:
        task, broken = asyncio.ensure_future(work), asyncio.ensure_future(self._broken.wait())
        try:
            await asyncio.wait([task, broken], return_when=asyncio.FIRST_COMPLETED)
            if self._broken.is_set():
                raise self._error
            return task.result()
        finally:
            for one in (task, broken):
                one.cancel()
            await asyncio.gather(task, broken, return_exceptions=True)


def channel_pair() -> tuple[MemoryChannel, MemoryChannel]:
    """The sender's end and the receiver's."""
    one, other = MemoryChannel(), MemoryChannel()
    one.other, other.other = other, one
    return one, other


async def carried(sending: Coroutine[Any, Any, None], receiving: Coroutine[Any, Any, None], one: MemoryChannel) -> None:
    """Run both ends; as an end fails the other one is told. Raises the receiver's error, or else the sender's."""

    async def end(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except BaseException as error:
            one.break_both(error if isinstance(error, Unavailable) else Unavailable("the other end has given up"))
            raise

    done = await asyncio.gather(end(receiving), end(sending), return_exceptions=True)
    failed = [error for error in done if error is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, Unavailable)):
        raise error
