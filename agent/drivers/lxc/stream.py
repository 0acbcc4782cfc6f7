"""A container on its way to another node: a header, then the files of each volume as a tar archive.

The stream is a line that names the format and its version, then frames: a letter, four bytes of length (big-endian)
and as many bytes. `H` holds the header in JSON, `D` a piece of a volume, `V` ends a volume, `E` ends the stream. A
stream that was cut is thereby known. Numeric ids are those inside the container, so it fits every node's id map.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator

import msgspec
from msgspec import Struct

from common.errors import InvalidRequest

MAGIC = b"vzfleet-container 1\n"
MAX_FRAME = 4 * 1024 * 1024
MAX_SNAPSHOTS = 10_000
_FRAME = struct.Struct("!cI")


class SentSnapshot(Struct, frozen=True):
    """A snapshot in the stream; `created_at` in seconds since 1970."""

    name: str
    created_at: float


class Header(Struct, frozen=True):
    """What comes: the volumes of these snapshots in their order, then the root."""

    halt_signal: str
    snapshots: tuple[SentSnapshot, ...]


def opening(header: Header) -> bytes:
    """The beginning of a stream."""
    return MAGIC + _frame(b"H", msgspec.json.encode(header))


async def volume(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A volume's part of a stream."""
    async for piece in pieces:
        yield _frame(b"D", piece)
    yield _frame(b"V", b"")


def ending() -> bytes:
    """The end of a stream."""
    return _frame(b"E", b"")


def _frame(kind: bytes, content: bytes) -> bytes:
    return _FRAME.pack(kind, len(content)) + content


class StreamReader:
    """Reads a stream: `header`, then `volume` for each of its volumes, then `finish`. All raise InvalidRequest."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def header(self) -> Header:
        """What comes."""
        if await self._take(len(MAGIC)) != MAGIC:
            raise InvalidRequest("the stream holds no container, or one in a format that is not known here")
        kind, content = await self._next()
        if kind != b"H":
            raise InvalidRequest("the stream does not begin with a header")
        try:
            header = msgspec.json.decode(content, type=Header)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"the stream's header cannot be read: {error}") from None
        if len(header.snapshots) > MAX_SNAPSHOTS:
            raise InvalidRequest("the stream has too many snapshots", allowed=f"at most {MAX_SNAPSHOTS}")
        return header

    async def volume(self) -> AsyncIterator[bytes]:
        """The archive of the next volume."""
        while True:
            kind, content = await self._next()
            if kind == b"V":
                return
            if kind != b"D":
                raise InvalidRequest("the stream is damaged")
            yield content

    async def finish(self) -> None:
        """Make sure that the stream has ended well."""
        kind, _ = await self._next()
        if kind != b"E":
            raise InvalidRequest("the stream is damaged")

    async def _next(self) -> tuple[bytes, bytes]:
        kind, length = _FRAME.unpack(await self._take(_FRAME.size))
        if length > MAX_FRAME:
            raise InvalidRequest("the stream is damaged")
        return kind, await self._take(length)

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            piece = await anext(self._stream, None)
            if piece is None:
                raise InvalidRequest("the stream ends too early")
            self._buffer += piece
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken
