"""Storage in plain directories, for hosts without btrfs: no disk limits, and a snapshot is a full copy."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from agent.storage.volumes import VolumeTree, finished, make_directory, remove_tree
from common.errors import Unsupported
from common.process import run

COPY_TIMEOUT = 3600.0


class DirStorage(VolumeTree):
    """Volumes below `<state>/volumes`. Where the file system shares blocks (reflinks), so do copies."""

    name = "dir"
    disk_limits = False
    instant = False

    async def open(self) -> None:
        make_directory(self.root)
        await asyncio.to_thread(self._prepare)

    async def shut_down(self) -> None:
        """Nothing is held."""

    async def purge(self) -> None:
        await finished(self._purge)

    def _purge(self) -> None:
        if self.root.exists():
            self._remove_all()
            shutil.rmtree(self.root)

    def _make(self, path: Path) -> None:
        path.mkdir()

    def _remove(self, path: Path) -> None:
        remove_tree(path)

    async def clone(self, source: str) -> Path:
        staging = await self.create()
        arguments = [
            "cp",
            "-a",
            "--reflink=auto",
            "--one-file-system",
            "-T",
            "--",
            str(self.path(source)),
            str(staging),
        ]
        try:
            await run(arguments, timeout=COPY_TIMEOUT)
        except BaseException:
            await self.discard(staging)
            raise
        return staging

    async def snapshot(self, _source: str, _volume: str) -> None:
        raise Unsupported("storage 'dir' has no read-only snapshots; btrfs has")

    async def set_limit(self, _volume: str, size: int | None) -> None:
        if size is not None:
            raise Unsupported("storage 'dir' cannot hold a disk limit; btrfs can", field="config.limits.disk")

    async def limit_staging(self, staging: Path, size: int | None) -> None:
        """Not held here."""

    def usage(self, _volume: str) -> tuple[int | None, int | None]:
        """Not known without reading the whole tree."""
        return None, None
