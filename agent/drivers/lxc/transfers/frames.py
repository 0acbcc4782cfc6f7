"""What the two ends say to each other: messages in JSON, and volumes in pieces.

A frame is a letter, four bytes of length (big-endian) and as many bytes: `J` holds a message, `D` a piece of a volume,
`V` ends a volume.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator
from typing import TypeVar

import msgspec
from msgspec import Struct

from agent.channel.base import Channel
from agent.drivers.base import Format
from common.errors import InvalidRequest

VERSION = 2
MAX_SNAPSHOTS = 10_000
MAX_PIECE = 1024 * 1024
_MAX_MESSAGE = 4 * 1024 * 1024
_FRAME = struct.Struct("!cI")
_MESSAGE, _PIECE, _END = b"J", b"D", b"V"


class Volume(Struct, frozen=True):
    """A volume that may come: the snapshot `snapshot`, or (None) the container as it is in this round."""

    name: str
    snapshot: str | None = None
    created_at: float = 0.0


class Opening(Struct, frozen=True):
    """What the sender says first. `volumes`: in their order, the root last. `moving`: the identity moves along."""

    version: int
    format: Format
    round: int
    moving: bool
    volumes: tuple[Volume, ...]


class Answer(Struct, frozen=True):
    """What the receiver says then: the volumes that it has whole, or that nothing more is needed (`done`)."""

    whole: tuple[str, ...] = ()
    done: bool = False


class Next(Struct, frozen=True):
    """What the sender says before each volume. `parent` is the volume that it differs from.

    `changing_since`: files that were written to since then (seconds since 1970) may have changed under their time.
    """

    volume: str
    parent: str | None = None
    changing_since: float | None = None


class Taken(Struct, frozen=True):
    """What the receiver says at the end: it has everything, and with the last round the container is there."""

    taken: bool = True


Message = TypeVar("Message", bound=Struct)


class Frames:
    """One end's frames."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._data = memoryview(b"")

    async def tell(self, message: Struct) -> None:
        """Send a message."""
        content = msgspec.json.encode(message)
        await self._channel.write(_FRAME.pack(_MESSAGE, len(content)) + content)

    async def write(self, piece: bytes) -> None:
        """Send a piece of a volume, of at most MAX_PIECE bytes."""
        await self._channel.write(_FRAME.pack(_PIECE, len(piece)) + piece)

    async def end_volume(self) -> None:
        """Say that the volume is at its end."""
        await self._channel.write(_FRAME.pack(_END, 0))

    async def hear(self, kind: type[Message]) -> Message:
        """The message that comes next. Raises InvalidRequest for anything else."""
        letter, length = await self._header()
        if letter != _MESSAGE or length > _MAX_MESSAGE:
            raise InvalidRequest("the other end does not speak as agreed")
        content = bytearray()
        while len(content) < length:
            content += await self._take(length - len(content))
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"the other end's message cannot be read: {error}") from None

    async def volume(self) -> AsyncGenerator[memoryview, None]:
        """The pieces of the volume that comes next, as they come. Raises InvalidRequest for anything else."""
        while True:
            letter, length = await self._header()
            if letter == _END and length == 0:
                return
            if letter != _PIECE or length > MAX_PIECE:
                raise InvalidRequest("the other end does not speak as agreed")
            while length:
                piece = await self._take(length)
                length -= len(piece)
                yield piece

    async def finish(self, *, first: bool) -> None:
        """End at both ends: the one that is `first` ends before it waits for the other's end."""
        if first:
            await self._channel.end()
        if len(self._data) or await self._channel.read():
            raise InvalidRequest("the other end says more than was agreed")
        if not first:
            await self._channel.end()

    async def _header(self) -> tuple[bytes, int]:
        header = bytes(await self._take(_FRAME.size))
        while len(header) < _FRAME.size:
            header += await self._take(_FRAME.size - len(header))
        return _FRAME.unpack(header)

    async def _take(self, most: int) -> memoryview:
        """At most so many of the next bytes, as many as are there."""
        if not self._data:
            data = await self._channel.read()
            if not data:
                raise InvalidRequest("the other end says too little")
            self._data = memoryview(data)
        taken, self._data = self._data[:most], self._data[most:]
        return taken
