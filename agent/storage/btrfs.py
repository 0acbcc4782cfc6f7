"""Storage on btrfs: a subvolume a volume, snapshots in an instant, limits by quota groups (btrfs-qgroup(8))."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from agent.storage import btrfs_ioctl as btrfs
from agent.storage.loop import LoopPool
from agent.storage.volumes import VolumeTree, finished, make_directory, remove_if_empty, translated
from common.errors import Unsupported

log = logging.getLogger(__name__)
_SYSFS = Path("/sys/fs/btrfs")
_NO_LIMIT = 2**64 - 1
_FIRST_SUBVOLUME = 256


class BtrfsStorage(VolumeTree):
    """Volumes in a pool of its own (a loop file), or in a directory of a btrfs that the host has.

    Usage and limits count what a subvolume refers to, shared with an image or not: a container sees its whole root
    file system against `limits.disk`.
    """

    name = "btrfs"
    disk_limits = True
    instant = True

    def __init__(self, root: Path, loop: LoopPool | None) -> None:
        super().__init__(root)
        self._loop = loop
        self._qgroups = ""

    async def open(self) -> None:
        if self._loop is not None:
            await self._loop.mount()
        try:
            await asyncio.to_thread(self._open)
        except OSError as error:
            raise translated(error, f"the pool {self.root} cannot be used as btrfs") from error

    def _open(self) -> None:
        btrfs.filesystem_id(self.root.parent if self._loop is None else self.root)  # before anything is made there
        make_directory(self.root)
        self._qgroups = f"{_SYSFS / btrfs.filesystem_id(self.root)}/qgroups"
        if not Path(self._qgroups).is_dir():
            btrfs.enable_quotas(self.root)
        self._prepare()
        self._sweep_quota_groups()

    def _sweep_quota_groups(self) -> None:
        """Remove the quota groups of subvolumes that are no more."""
        with btrfs.directory(self.root) as pool:
            numbers = [int(group.name.removeprefix("0_")) for group in Path(self._qgroups).glob("0_[0-9]*")]
            for number in numbers:
                if number >= _FIRST_SUBVOLUME and not btrfs.exists(pool, number):
                    btrfs.drop_qgroup(pool, number)

    async def shut_down(self) -> None:
        if self._loop is not None:
            await self._loop.unmount()

    async def purge(self) -> None:
        if self._loop is not None:
            await asyncio.to_thread(self._loop.remove)
        elif self.root.exists():
            await asyncio.to_thread(self._purge)

    def _purge(self) -> None:
        self._prepare()
        self._remove_all()
        remove_if_empty(self.root)

    def _make(self, path: Path) -> None:
        btrfs.create_subvolume(path)

    def _remove(self, path: Path) -> None:
        btrfs.delete_subvolume(path)

    async def clone(self, source: str) -> Path:
        return await self._staged(self._clone, self.path(source))

    def _clone(self, source: Path) -> Path:
        staging = self._staging / os.urandom(8).hex()
        try:
            btrfs.snapshot(source, staging)
            # The kernel gives a snapshot its source's limit: a full one could not even be marked.
            if self._figures(staging)[1] is not None:
                btrfs.set_limit(staging, None)
        except OSError as error:
            raise translated(error, f"{source.name} cannot be cloned") from error
        return staging

    async def snapshot(self, source: str, volume: str) -> None:
        await finished(self._snapshot, self.path(source), self.path(volume))

    def _snapshot(self, source: Path, target: Path) -> None:
        try:
            if os.path.lexists(target):
                return
            if btrfs.has_nested(source):
                raise Unsupported(f"{source.name} has subvolumes inside, which a btrfs stream would leave out")
            btrfs.snapshot(source, target, read_only=True)
        except OSError as error:
            raise translated(error, f"no snapshot of {source.name} can be taken") from error

    async def set_limit(self, volume: str, size: int | None) -> None:
        await self.limit_staging(self.path(volume), size)

    async def limit_staging(self, staging: Path, size: int | None) -> None:
        try:
            await asyncio.to_thread(btrfs.set_limit, staging, size)
        except OSError as error:
            raise translated(error, f"the disk limit of {staging.name} cannot be set") from error

    def usage(self, volume: str) -> tuple[int | None, int | None]:
        """True as of the pool's last commit, at most 30 s ago."""
        return self._figures(self.path(volume))

    def _figures(self, path: Path) -> tuple[int | None, int | None]:
        try:
            group = f"{self._qgroups}/0_{btrfs.subvolume_id(path)}"
        except FileNotFoundError:
            return None, None
        limit = _number(f"{group}/max_referenced")
        return _number(f"{group}/referenced"), limit if limit and limit < _NO_LIMIT else None


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123 -- read at every sample
            return int(file.read())
    except (FileNotFoundError, ValueError):
        return None
