"""Snapshots of containers: a volume each, with a note of when it was taken."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.drivers.lxc import rootfs
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.records import Record
from common.clock import Clock
from common.errors import Conflict, NotFound
from common.reports import SnapshotReport

SNAPSHOT_NOTE = "snapshot.json"


class Note(Struct, frozen=True):
    """When a snapshot was taken, in seconds since 1970."""

    created_at: float


class Snapshots:
    """The snapshots of a node's containers."""

    def __init__(self, host: Host, clock: Clock) -> None:
        self._host = host
        self._clock = clock

    def volume(self, container: str, snapshot: str) -> str:
        """A snapshot's volume. Raises NotFound."""
        name = f"snapshots/{container}/{snapshot}"
        if not self._host.storage.path(name).is_dir():
            raise NotFound(f"container {container} has no snapshot {snapshot}")
        return name

    def all(self, container: str) -> list[SnapshotReport]:
        """A container's snapshots, the oldest first."""
        names = (Path(name).name for name in self._host.storage.volumes(f"snapshots/{container}"))
        reports = [SnapshotReport(name, self._created_at(container, name)) for name in names]
        return sorted(reports, key=lambda report: (report.created_at, report.name))

    def _created_at(self, container: str, snapshot: str) -> float:
        note = self._host.storage.path(f"snapshots/{container}/{snapshot}") / SNAPSHOT_NOTE
        return msgspec.json.decode(note.read_bytes(), type=Note).created_at

    async def create(self, container: str, snapshot: str) -> None:
        """Take one. There already is success. Where copying takes time the container must not change meanwhile.

        Raises DriverFailed when the container's files were removed by hand: a snapshot of nothing is none.
        """
        self._host.records.get(container)
        if self._host.storage.path(f"snapshots/{container}/{snapshot}").is_dir():
            return
        self._host.require_files(container)
        staging = await self._host.storage.clone(f"containers/{container}")
        await self.admit(container, snapshot, self._clock.now().timestamp(), staging)

    async def admit(self, container: str, snapshot: str, created_at: float, staging: Path) -> None:
        """Make a snapshot of a staging volume."""
        try:
            (staging / SNAPSHOT_NOTE).write_bytes(msgspec.json.encode(Note(created_at)))
            await self._host.storage.commit(staging, f"snapshots/{container}/{snapshot}")
        except BaseException:
            await self._host.storage.discard(staging)
            raise

    async def delete(self, container: str, snapshot: str) -> None:
        """Remove one. Absent is success."""
        await self._host.storage.delete(f"snapshots/{container}/{snapshot}")

    async def rename(self, container: str, snapshot: str, new: str) -> None:
        """Call one otherwise. Done already is success. Raises NotFound, or Conflict when the name is taken."""
        storage = self._host.storage
        source, target = (f"snapshots/{container}/{name}" for name in (snapshot, new))
        there, taken = storage.path(source).is_dir(), storage.path(target).is_dir()
        if not there and not taken:
            raise NotFound(f"container {container} has no snapshot {snapshot}")
        if there and taken and source != target:
            raise Conflict(f"container {container} has a snapshot {new} already")
        if there and not taken:
            await storage.rename(source, target)

    async def restore(self, record: Record, snapshot: str) -> None:
        """Put a stopped container's files back; its name, limit and kind stay."""
        host, container = self._host, record.spec.id
        staging = await host.storage.clone(self.volume(container, snapshot))
        try:
            (staging / SNAPSHOT_NOTE).unlink()
            owner = host.owner(record.settings.privileged)
            await asyncio.to_thread(rootfs.set_hostname, staging / "rootfs", record.spec.hostname, owner)
            await host.storage.limit_staging(staging, record.settings.disk)
            await host.storage.commit(staging, f"containers/{container}")
        except BaseException:
            await host.storage.discard(staging)
            raise
