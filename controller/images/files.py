"""Image files on the controller's disk: each is named by the sha256 of its bytes and is whole or absent."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

from common.errors import Cancelled, NoSpace, TooLarge
from common.names import FINGERPRINT, check_fingerprint

BATCH = 1024 * 1024
Mark = tuple[int, "hashlib._Hash"]
"""A place in a staged file: its size there, and the hash up to there."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StagedImage:
    """A file that is being written. It ends by `ImageFiles.keep` or by `discard`.

    `size` is what was written so far, in bytes; `fingerprint` is None until `finish`. Not for two writers at once.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._descriptor, name = tempfile.mkstemp(dir=directory, prefix="image-")
        self.path = Path(name)
        self.size = 0
        self.fingerprint: str | None = None
        self._limit = limit
        self._hash = hashlib.sha256()
        self._batch = bytearray()
        self._closed = False
        self._running: asyncio.Future[None] | None = None

    async def write(self, chunk: bytes) -> None:
        """Append bytes. Raises TooLarge over the limit, NoSpace when the disk is full; then the file is gone."""
        self._check_open()
        self.size += len(chunk)
        if self.size > self._limit:
            self.discard()
            raise TooLarge(f"the image is over the limit of {self._limit} bytes", allowed=f"at most {self._limit}")
        self._batch += chunk
        if len(self._batch) >= BATCH:
            await self._flush()

    async def mark(self) -> Mark:
        """The present end, to come back to it. Raises NoSpace."""
        self._check_open()
        await self._flush()
        return self.size, self._hash.copy()

    async def rewind(self, mark: Mark) -> None:
        """Forget what was written since. Raises NoSpace."""
        self._check_open()
        await self._flush()
        self.size = mark[0]
        self._hash = mark[1].copy()
        await self._in_thread(lambda: self._cut(mark[0]))

    async def finish(self) -> tuple[str, int]:
        """No more bytes will come: gives the fingerprint and the size in bytes. Raises NoSpace."""
        self._check_open()
        await self._flush()
        self.fingerprint = self._hash.hexdigest()
        return self.fingerprint, self.size

    async def move(self, target: Path) -> None:
        """Make the finished file durable under its final name, in one step. Raises NoSpace."""
        self._check_open()
        await self._in_thread(lambda: self._move(target))
        self._close()

    def discard(self) -> None:
        """Remove the file. After `ImageFiles.keep`, or a second time, it does nothing."""
        if self._closed:
            return
        self._closed = True
        self.path.unlink(missing_ok=True)
        if self._running is None or self._running.done():
            os.close(self._descriptor)
        else:  # The thread still writes to the descriptor, whose number must not be given away before it is done.
            self._running.add_done_callback(self._close_after)

    def _close_after(self, running: asyncio.Future[None]) -> None:
        running.exception()  # Retrieved: whoever waited for it was cancelled.
        os.close(self._descriptor)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def _check_open(self) -> None:
        if self._closed:
            raise Cancelled("the image file was given up")

    async def _flush(self) -> None:
        batch, self._batch = self._batch, bytearray()
        await self._in_thread(lambda: self._append(batch))

    def _append(self, batch: bytearray) -> None:
        self._hash.update(batch)
        left = memoryview(batch)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def _cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        os.lseek(self._descriptor, size, os.SEEK_SET)

    def _move(self, target: Path) -> None:
        os.fsync(self._descriptor)
        self.path.replace(target)
        sync_directory(target.parent)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        self._running = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            await asyncio.shield(self._running)
        except OSError as error:
            self.discard()
            if error.errno in _FULL:
                raise NoSpace(f"no space left for the image in {self.path.parent}") from None
            raise
        except BaseException:
            self.discard()
            raise


class ImageFiles:
    """The directory of image files: `<fingerprint>` each, and `incoming/` for what is not whole yet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming = directory / "incoming"

    def stage(self, limit: int) -> StagedImage:
        """A new empty file that takes at most `limit` bytes."""
        self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
        return StagedImage(self._incoming, limit)

    async def receive(self, chunks: AsyncIterator[bytes], limit: int) -> StagedImage:
        """Write a whole stream. Raises TooLarge over `limit` bytes, NoSpace, or what the stream raises."""
        staged = self.stage(limit)
        try:
            async for chunk in chunks:
                await staged.write(chunk)
            await staged.finish()
        except BaseException:
            staged.discard()
            raise
        return staged

    async def keep(self, staged: StagedImage) -> Path:
        """Make a finished file durable as `<fingerprint>`. The same content may be there already. Raises NoSpace."""
        if staged.fingerprint is None:
            raise ValueError("only a finished file can be kept")
        target = self.path(staged.fingerprint)
        await staged.move(target)
        return target

    def path(self, fingerprint: str) -> Path:
        """Where an image file is, whether it exists or not. Raises InvalidRequest for what is no fingerprint."""
        return self._directory / check_fingerprint(fingerprint)

    def delete(self, fingerprint: str) -> None:
        """Remove an image file; absent is success. Who reads it at the moment reads on to its end."""
        self.path(fingerprint).unlink(missing_ok=True)

    def fingerprints(self) -> list[str]:
        """The images that are whole, sorted."""
        if not self._directory.is_dir():
            return []
        return sorted(entry.name for entry in self._directory.iterdir() if FINGERPRINT.fullmatch(entry.name))

    def scratch(self) -> Path:
        """A new directory for a build, removed by its user, or by `sweep` after a crash."""
        self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self._incoming, prefix="build-"))

    def sweep(self) -> None:
        """Remove what a crash left half-written. For the start of the controller, before anything is staged."""
        if not self._incoming.is_dir():
            return
        for entry in self._incoming.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def sweep_unknown(self, known: Collection[str]) -> None:
        """Remove the files of images that neither have a row nor are about to: a crash came before it was written."""
        for fingerprint in self.fingerprints():
            if fingerprint not in known:
                self.delete(fingerprint)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable (fsync(2))."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
