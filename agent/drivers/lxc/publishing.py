"""Containers as images: their root file system in LXD's unified format, without what is one container's own."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from agent.drivers.base import Publication
from agent.drivers.lxc import archive, rootfs
from agent.drivers.lxc.containers import volume
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.snapshots import Snapshots

Still = Callable[[str], AbstractAsyncContextManager[None]]
"""Holds a running container's processes where copying its files takes time."""
_HOSTNAME = "rootfs/etc/hostname"


class Publisher:
    """Packs containers and snapshots of a node."""

    def __init__(self, host: Host, snapshots: Snapshots) -> None:
        self._host = host
        self._snapshots = snapshots

    async def publish(self, what: Publication, still: Still, running: bool) -> AsyncGenerator[bytes, None]:
        """Pack it; one that is `running` from a copy of its files, while which it is held `still`. Raises NotFound."""
        privileged = self._host.records.get(what.container).settings.privileged
        if what.snapshot is not None:
            place = self._host.storage.path(self._snapshots.volume(what.container, what.snapshot))
        else:
            self._host.require_files(what.container)
            place = self._host.storage.path(volume(what.container))
        if running:
            async with still(what.container):
                place = await self._host.storage.clone(volume(what.container))
        try:
            async with contextlib.aclosing(self._pack(place, what, privileged)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            if running:
                await self._host.storage.discard(place)

    def _pack(self, place: Path, what: Publication, privileged: bool) -> AsyncGenerator[bytes, None]:
        """An empty machine-id stands for the container's own: who is created from the image gets a new one."""
        machine_ids = [f"rootfs/{path}" for path in rootfs.machine_ids(place / "rootfs")]
        head = _member("metadata.yaml", what.metadata, 0o644)
        head += b"".join(_member(name, b"", 0o444) for name in machine_ids)
        left_out = (_HOSTNAME, *machine_ids)
        return archive.pack_image(place, self._host.id_map(privileged), head, what.compression, left_out)


def _member(name: str, content: bytes, mode: int) -> bytes:
    """A file of root's as it stands in a tar archive."""
    facts = tarfile.TarInfo(name)
    facts.size, facts.mode = len(content), mode
    padding = b"\0" * (-len(content) % tarfile.BLOCKSIZE)
    return facts.tobuf(tarfile.PAX_FORMAT) + content + padding
