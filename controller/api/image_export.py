"""/1.0/images/<fingerprint>/export: an image's file as it is, in one part, or in two as LXD gives split images."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from tornado.iostream import StreamClosedError

from common.errors import NotFound
from controller.api.base import Handler
from controller.api.identity import Right
from controller.api.public import caller_or_anyone
from controller.records import Image

CHUNK = 256 * 1024
PATIENCE = 60.0
"""Seconds within which the next chunk must have been taken."""
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class Piece:
    """A stretch of the file, after `head` (bytes that stand in no file)."""

    head: bytes
    start: int
    size: int

    @property
    def length(self) -> int:
        """The bytes that it takes."""
        return len(self.head) + self.size


def range_of(text: str, size: int) -> tuple[int, int] | None:
    """Where `Range: bytes=` begins and ends (RFC 9110, 14.1.2); None for what is no such range, and is then ignored.

    A range that the file does not have is (size, size).
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        return max(0, size - int(suffix)) if int(suffix) else size, size
    if last and int(last) < int(first):
        return None
    return min(int(first), size), min(int(last) + 1, size) if last else size


def file_name(image: Image) -> str:
    """A name for the file that can stand in a header and in any file system."""
    name = _UNSAFE.sub("_", image.filename).lstrip(".")
    return name or f"{image.fingerprint}.tar"


class Export(Handler):
    """GET; anyone may have a public image. `Range` is served for images of one part."""

    rights = {"GET": Right.PUBLIC}

    async def get(self, fingerprint: str) -> None:
        caller = caller_or_anyone(self)
        image = self.services.images.by_fingerprint(fingerprint, public=caller is None)
        try:
            file = self.services.images.path(image.fingerprint).open("rb")
        except FileNotFoundError:
            raise NotFound(f"the file of image {image.fingerprint[:12]} is missing", field="fingerprint") from None
        with file:
            pieces = self._two_parts(image) if image.rootfs_offset else self._one_part(image)
            if pieces is None:
                return
            self.set_header("Content-Length", str(sum(piece.length for piece in pieces)))
            try:
                async for chunk in _read(file, pieces):
                    self.write(chunk)
                    await asyncio.wait_for(self.flush(), PATIENCE)
            except StreamClosedError:
                return
            except TimeoutError:
                # Cut off, so that it does not look complete.
                self.detach().close()

    def _one_part(self, image: Image) -> list[Piece] | None:
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Content-Disposition", f'attachment; filename="{file_name(image)}"')
        self.set_header("Accept-Ranges", "bytes")
        wanted = range_of(self.request.headers.get("Range", ""), image.size)
        if wanted is None:
            return [Piece(b"", 0, image.size)]
        start, end = wanted
        if start == end:
            self.set_header("Content-Range", f"bytes */{image.size}")
            self.set_status(416)
            self.finish()
            return None
        self.set_status(206)
        self.set_header("Content-Range", f"bytes {start}-{end - 1}/{image.size}")
        return [Piece(b"", start, end - start)]

    def _two_parts(self, image: Image) -> list[Piece]:
        """A multipart form with the files `metadata` and `rootfs`, as LXD's export has it."""
        boundary = secrets.token_hex(30)
        self.set_header("Content-Type", f"multipart/form-data; boundary={boundary}")
        name = file_name(image)
        metadata = Piece(_part_head(boundary, "metadata", f"meta-{name}"), 0, image.rootfs_offset)
        rest = image.size - image.rootfs_offset
        root = Piece(b"\r\n" + _part_head(boundary, "rootfs", name), image.rootfs_offset, rest)
        return [metadata, root, Piece(f"\r\n--{boundary}--\r\n".encode(), 0, 0)]


def _part_head(boundary: str, name: str, filename: str) -> bytes:
    lines = (
        f"--{boundary}",
        f'Content-Disposition: form-data; name="{name}"; filename="{filename}"',
        "Content-Type: application/octet-stream",
        "",
        "",
    )
    return "\r\n".join(lines).encode()


async def _read(file: BinaryIO, pieces: list[Piece]) -> AsyncIterator[bytes]:
    """The bytes of all pieces. The file is read in threads, and many readers of it share the kernel's cache."""
    loop = asyncio.get_running_loop()
    for piece in pieces:
        if piece.head:
            yield piece.head
        for start, size in _stretches(piece):
            yield await loop.run_in_executor(None, _read_at, file, start, size)


def _stretches(piece: Piece) -> Iterator[tuple[int, int]]:
    end = piece.start + piece.size
    for start in range(piece.start, end, CHUNK):
        yield start, min(CHUNK, end - start)


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


routes = [(r"/1\.0/images/([^/]+)/export", Export)]
