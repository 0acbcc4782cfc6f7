"""What both kinds of storage share: where volumes stand, staging, and giving names in one step."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import secrets
import shutil
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

from agent.storage.base import Storage
from common.errors import DriverFailed, NoSpace

KINDS = ("images", "containers", "snapshots", "transfers")
STAGING = "staging"
PASSABLE = 0o711
TRANSFER_LIFETIME = 24 * 3600.0
"""Seconds after its last round when a transfer, which nobody ended, is swept at `open`."""
_RENAME_EXCHANGE = 2
_LIBC = ctypes.CDLL(None, use_errno=True)


class VolumeTree(Storage):
    """Volumes as directories `<root>/<volume>`; what is not whole yet stands in `<root>/staging/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = root / STAGING

    @abstractmethod
    def _make(self, path: Path) -> None:
        """Make an empty volume at `path`."""

    @abstractmethod
    def _remove(self, path: Path) -> None:
        """Remove the volume at `path`, which has no name any more."""

    def path(self, volume: str) -> Path:
        return self.root / volume

    async def create(self) -> Path:
        return await self._staged(self._new_staging)

    async def _staged(self, work: Callable[..., Path], *arguments: object) -> Path:
        """Run work that makes a staging volume in a thread; when the caller is cancelled it is removed again."""
        task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            if task.exception() is None:
                await finished(self._discard, task.result())
            raise

    def _new_staging(self) -> Path:
        staging = self._staging / secrets.token_hex(8)
        try:
            self._make(staging)
            staging.chmod(PASSABLE)
        except OSError as error:
            raise translated(error, "a volume cannot be made") from error
        return staging

    async def commit(self, staging: Path, volume: str) -> None:
        await finished(self._commit, staging, self.path(volume))

    def _commit(self, staging: Path, target: Path) -> None:
        try:
            make_directory(target.parent)
            replaces = os.path.lexists(target)
            if replaces:
                exchange(staging, target)
            else:
                staging.rename(target)
            sync_directory(target.parent)
        except OSError as error:
            raise translated(error, f"{target.name} cannot be put in place") from error
        if replaces:
            self._discard(staging)

    async def discard(self, staging: Path) -> None:
        await finished(self._discard, staging)

    def _discard(self, staging: Path) -> None:
        if not os.path.lexists(staging):
            return
        try:
            self._remove(staging)
        except OSError as error:
            raise translated(error, f"{staging.name} cannot be removed") from error

    async def delete(self, volume: str) -> None:
        await finished(self._delete, self.path(volume))

    def _delete(self, target: Path) -> None:
        staging = self._staging / secrets.token_hex(8)
        try:
            target.rename(staging)
        except FileNotFoundError:
            return
        except OSError as error:
            raise translated(error, f"{target.name} cannot be removed") from error
        self._discard(staging)
        if target.parent.name not in KINDS:
            remove_if_empty(target.parent)

    async def rename(self, volume: str, new: str) -> None:
        await finished(self._rename, self.path(volume), self.path(new))

    def _rename(self, source: Path, target: Path) -> None:
        try:
            make_directory(target.parent)
            source.rename(target)
            sync_directory(target.parent)
        except FileNotFoundError:
            if not os.path.lexists(target):
                raise DriverFailed(f"there is no volume {source.name}") from None
        except OSError as error:
            raise translated(error, f"{source.name} cannot be renamed") from error

    def volumes(self, kind: str) -> list[str]:
        try:
            with os.scandir(self.root / kind) as entries:
                return sorted(f"{kind}/{entry.name}" for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def pool(self) -> tuple[int, int]:
        figures = os.statvfs(self.root)
        return figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize

    def _prepare(self) -> None:
        """Make the directories, and remove what a crash left in staging."""
        for name in (*KINDS, STAGING):
            make_directory(self.root / name)
        for leftover in sorted(self._staging.iterdir()):
            self._discard(leftover)
        for transfer in sorted((self.root / "transfers").iterdir()):
            if time.time() - transfer.lstat().st_mtime > TRANSFER_LIFETIME:
                self._delete(transfer)

    def _remove_all(self) -> None:
        for kind in KINDS:
            for path in sorted((self.root / kind).glob("*/*" if kind == "snapshots" else "*")):
                self._delete(path)
            shutil.rmtree(self.root / kind, ignore_errors=True)
        remove_if_empty(self._staging)


async def finished(work: Callable[..., None], *arguments: object) -> None:
    """Run `work` in a thread to its end, also when the caller is cancelled: a thread cannot be stopped half-way."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def make_directory(path: Path) -> None:
    """Make a directory which a container's mapped root can pass through but not list."""
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        path.chmod(PASSABLE)


def remove_if_empty(path: Path) -> None:
    """Remove a directory unless something is in it."""
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, however deep it is. Follows no link. Raises OSError.

    The standard library calls itself for every level (until Python 3.13), and a container can make a thousand of them.
    """
    done = subprocess.run(
        ["rm", "-rf", "--one-file-system", "--", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        raise OSError(errno.EIO, done.stderr[-300:].decode(errors="replace").strip(), str(path))


async def sync_files(path: Path) -> None:
    """Make all that was written to the file system of a directory durable (syncfs(2))."""
    await finished(_sync_files, path)


def _sync_files(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _LIBC.syncfs(descriptor) != 0:
            raise DriverFailed(f"{path.name} cannot be written: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> None:
    """Swap two directories in one step (renameat2(2), RENAME_EXCHANGE)."""
    names = os.fsencode(one), os.fsencode(other)
    if _LIBC.renameat2(-100, names[0], -100, names[1], _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def translated(error: OSError, what: str) -> DriverFailed | NoSpace:
    """An error of the kernel as one that may be shown."""
    kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else DriverFailed
    return kind(f"{what}: {error.strerror}")
