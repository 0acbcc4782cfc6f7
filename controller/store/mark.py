"""The side file that remembers the last commit: what the database must have, when it is opened again.

SQLite drops the tail of a truncated or damaged write-ahead log without a word (measured), and a database that was put
back from a copy is whole by itself. Each commit carries a number, in the database and here; a database whose number
is lower than the mark's has lost commits. The mark is written after the commit and before anybody is answered. It is
not synchronised at each commit: after a power failure it may be lower than the truth, which is harmless.
"""

from __future__ import annotations

import logging
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)
_SLOT = 512
"""Two slots of a sector each, written in turn: one of them is whole whatever happens."""
_FORMAT = struct.Struct("<8sQQB")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"vzfmark1"
_SYNC_EVERY = 1.0


@dataclass(frozen=True)
class Marked:
    """What a mark says: the last commit, and whether the store was closed after it."""

    commits: int
    clean: bool


class Mark:
    """The mark of one store. One process writes it at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._turn = 0
        self._commits = 0
        self._synchronised = 0.0
        self._failing = False

    def read(self) -> Marked | None:
        """What it says; None when there is none, or none that can be read."""
        found = self._newest()
        return None if found is None else found[1]

    def open(self, commits: int) -> None:
        """Begin to write it: from now on the store counts as open. Raises OSError."""
        newest = self._newest()
        self._turn = newest[0] if newest is not None else 0
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(self._descriptor).st_size < 2 * _SLOT:
            os.pwrite(self._descriptor, bytes(2 * _SLOT), 0)
        self._put(commits, clean=False)
        os.fsync(self._descriptor)

    def advance(self, commits: int) -> None:
        """Note a commit. Its failure loses nothing but the proof, so it is logged alone."""
        if self._descriptor is None:
            return
        try:
            self._put(commits, clean=False)
            now = time.monotonic()
            if now - self._synchronised >= _SYNC_EVERY:
                os.fdatasync(self._descriptor)
                self._synchronised = now
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("the mark of the store cannot be written", extra={"reason": str(error)})
            self._failing = True

    def close(self) -> None:
        """The store is closed in order."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            self._write(descriptor, self._commits, clean=True)
            os.fsync(descriptor)
        except OSError as error:
            log.error("the mark of the store cannot be written", extra={"reason": str(error)})
        finally:
            os.close(descriptor)

    def _put(self, commits: int, *, clean: bool) -> None:
        if self._descriptor is not None:
            self._write(self._descriptor, commits, clean=clean)
            self._commits = commits

    def _write(self, descriptor: int, commits: int, *, clean: bool) -> None:
        self._turn += 1
        body = _FORMAT.pack(_MAGIC, self._turn, commits, clean)
        os.pwrite(descriptor, body + _CHECKSUM.pack(zlib.crc32(body)), self._turn % 2 * _SLOT)

    def _newest(self) -> tuple[int, Marked] | None:
        """The slot that was written last: (its turn, what it says)."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        slots = [slot for slot in (_decode(content[:_SLOT]), _decode(content[_SLOT:])) if slot is not None]
        return max(slots, key=lambda slot: slot[0], default=None)


def _decode(slot: bytes) -> tuple[int, Marked] | None:
    body = slot[: _FORMAT.size]
    checksum = slot[_FORMAT.size : _FORMAT.size + _CHECKSUM.size]
    if len(checksum) < _CHECKSUM.size or _CHECKSUM.unpack(checksum)[0] != zlib.crc32(body):
        return None
    magic, turn, commits, clean = _FORMAT.unpack(body)
    return (turn, Marked(commits, bool(clean))) if magic == _MAGIC else None
