"""A btrfs pool in a sparse file, mounted through a loop device which goes when it is unmounted."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from agent.storage.volumes import make_directory, remove_if_empty
from common.errors import DriverFailed
from common.process import run

log = logging.getLogger(__name__)
TIMEOUT = 120.0
_OPTIONS = "loop,noatime"
_RELEASE_TIMEOUT = 10.0
_PAUSE = 0.02


class LoopPool:
    """The file `<state>/pool.img`, mounted at `<state>/pool`."""

    def __init__(self, image: Path, point: Path, size: int) -> None:
        self._image = image
        self._point = point
        self._size = size

    @property
    def exists(self) -> bool:
        """Whether the file has been made."""
        return self._image.exists()

    async def mount(self) -> None:
        """Mount it, making it on the first run; mounted already is fine. Raises DriverFailed."""
        make_directory(self._point)
        if self._point.is_mount():
            return
        if not self.exists:
            await self._make()
        await run(["mount", "-t", "btrfs", "-o", _OPTIONS, "--", str(self._image), str(self._point)], timeout=TIMEOUT)
        self._point.chmod(0o711)

    async def _make(self) -> None:
        # Under another name until it is whole: a half-made pool is never mounted.
        new = self._image.with_name(f".{self._image.name}.new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, self._size)
        finally:
            os.close(descriptor)
        try:
            await run(["mkfs.btrfs", "--quiet", "--metadata", "single", "--", str(new)], timeout=TIMEOUT)
            new.rename(self._image)
        finally:
            new.unlink(missing_ok=True)

    async def unmount(self) -> None:
        """Unmount it. Raises DriverFailed with the reason when it is in use."""
        if self._point.is_mount():
            await run(["umount", "--", str(self._point)], timeout=TIMEOUT)
        # The loop device goes with the last of the mounts, those in ending containers' namespaces too.
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT):
                while await asyncio.to_thread(self._attached):  # noqa: ASYNC110 -- the kernel tells nobody
                    await asyncio.sleep(_PAUSE)
        except TimeoutError:
            log.warning("the pool's loop device goes when the last mount namespace that has it ends")

    def _attached(self) -> bool:
        files = Path("/sys/block").glob("loop*/loop/backing_file")
        return any(_text(file) == str(self._image.resolve()) for file in files)

    def remove(self) -> None:
        """Remove the unmounted file and its mount point."""
        if self._point.is_mount():
            raise DriverFailed(f"{self._point} is still mounted")
        self._image.unlink(missing_ok=True)
        if self._point.exists():
            remove_if_empty(self._point)


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="surrogateescape").rstrip("\n")
    except OSError:
        return ""  # it went meanwhile
