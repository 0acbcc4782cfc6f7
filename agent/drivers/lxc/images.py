"""Images on the node: unpacked once for each kind of container, as the user whose files they will be."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.drivers.base import ReportProgress
from agent.drivers.lxc import archive, rootfs
from agent.drivers.lxc.host import Host
from agent.storage.volumes import remove_tree
from common.archives import MAX_ENTRIES, decompressed_limit
from common.errors import InvalidRequest, NoSpace, NotFound
from common.reports import ImageReport

LAYOUTS = ("unified", "rootfs", "split")
MAX_FILE = 64 * 2**30
_KEPT_FREE = 256 * 2**20
"""Bytes of the pool which no image may take."""
_TRAITS = "image.json"
_INODES_KEPT_FREE = 10_000
"""The same in files, where the file system has a number of them that it cannot exceed."""
_CHECK_EVERY = 0.1


class Traits(Struct, frozen=True):
    """What was found out when the image was unpacked. `halt_signal` is empty for an image without an init."""

    halt_signal: str
    size: int


def kind_of(privileged: bool) -> str:
    """The kind of volume for a kind of container."""
    return "privileged" if privileged else "mapped"


def volume_of(fingerprint: str, privileged: bool) -> str:
    """The volume of an image."""
    return f"images/{fingerprint}-{kind_of(privileged)}"


class Images:
    """The unpacked images."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def all(self) -> list[ImageReport]:
        """All of them, whatever kinds they are unpacked for."""
        found: dict[str, int] = {}
        for volume in self._host.storage.volumes("images"):
            fingerprint = Path(volume).name.rpartition("-")[0]
            found[fingerprint] = found.get(fingerprint, 0) + self._traits(volume).size
        return [ImageReport(image, size, self.has(image, privileged=False)) for image, size in sorted(found.items())]

    def has(self, fingerprint: str, privileged: bool) -> bool:
        """Whether it is there for this kind of container."""
        return self._host.storage.path(volume_of(fingerprint, privileged)).is_dir()

    def traits(self, fingerprint: str, privileged: bool) -> Traits:
        """What is known of it. Raises NotFound."""
        if not self.has(fingerprint, privileged):
            raise NotFound(f"image {fingerprint} is not unpacked on this node", field="image")
        return self._traits(volume_of(fingerprint, privileged))

    def _traits(self, volume: str) -> Traits:
        return msgspec.json.decode((self._host.storage.path(volume) / _TRAITS).read_bytes(), type=Traits)

    async def drop(self, fingerprint: str) -> None:
        """Remove it. Absent is success."""
        for privileged in (False, True):
            await self._host.storage.delete(volume_of(fingerprint, privileged))

    async def unpack(
        self, fingerprint: str, layout: str, file: Path, privileged: bool, report: ReportProgress, offset: int = 0
    ) -> None:
        """Unpack an image's file, whose archive begins at `offset`.

        Raises InvalidRequest for a file that holds no image, TooLarge, NoSpace.
        """
        if layout not in LAYOUTS:
            raise InvalidRequest(f"unknown image layout {layout!r}", field="layout", allowed=" or ".join(LAYOUTS))
        if self.has(fingerprint, privileged):
            return
        storage = self._host.storage
        staging = await storage.create()
        try:
            await self._fill(staging, layout, file, privileged, report, offset)
            await asyncio.to_thread(self._complete, staging, layout, file.stat().st_size)
            await storage.limit_staging(staging, None)
            await storage.commit(staging, volume_of(fingerprint, privileged))
        except BaseException:
            await storage.discard(staging)
            raise

    async def _fill(
        self, staging: Path, layout: str, file: Path, privileged: bool, report: ReportProgress, offset: int
    ) -> None:
        # The volume itself stays ours, so that nothing in the archive can be taken for what we write there.
        target = staging / ("unpacked" if layout == "unified" else "rootfs")
        target.mkdir()
        target.chmod(0o755)
        owner = self._host.owner(privileged)
        os.chown(target, owner, owner)
        room = self._host.storage.pool()[1] - _KEPT_FREE
        if room <= 0:
            raise NoSpace("the pool is full")
        await self._host.storage.limit_staging(staging, room)
        ids = archive.EVERY_ID if privileged else self._host.ids
        size = file.stat().st_size
        with file.open("rb", buffering=0) as source:
            source.seek(offset)
            bounds = archive.Bounds(MAX_ENTRIES, min(MAX_FILE, room), decompressed_limit(size))
            work = asyncio.ensure_future(archive.unpack_image(target, ids, source, bounds))
            try:
                while not (await asyncio.wait([work], timeout=_CHECK_EVERY))[0]:
                    # tar reads through the very same open file.
                    report("unpacking", min(99, os.lseek(source.fileno(), 0, os.SEEK_CUR) * 100 // max(1, size)))
                    if self._host.storage.pool()[1] < _KEPT_FREE // 2 or not _inodes_left(staging):
                        raise NoSpace("the image does not fit into the pool")
                work.result()
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    def _complete(self, staging: Path, layout: str, size: int) -> None:
        """Put the root in its place and note what it is like."""
        root = staging / "rootfs"
        if layout == "unified":
            try:
                (staging / "unpacked" / "rootfs").rename(root)
            except FileNotFoundError:
                raise InvalidRequest("the image has no rootfs", field="layout") from None
            remove_tree(staging / "unpacked")
        if root.is_symlink() or not root.is_dir():
            raise InvalidRequest("the image's rootfs is no directory", field="layout")
        traits = Traits(rootfs.halt_signal(root), size)
        (staging / _TRAITS).write_bytes(msgspec.json.encode(traits))


def _inodes_left(directory: Path) -> bool:
    """Whether more files can be made; btrfs has no number of them, and says 0."""
    figures = os.statvfs(directory)
    return not figures.f_files or figures.f_favail > _INODES_KEPT_FREE
