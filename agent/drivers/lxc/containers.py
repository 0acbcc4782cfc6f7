"""Making, changing and removing containers that do not run: their volumes, records and leases.

A container counts from the moment at which its record has its name. Its volume gets its name before, and bears a mark
until the record stands, by which a crash in between is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from agent.drivers.lxc import archive, commands, limits, rootfs
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.images import Images, volume_of
from agent.drivers.lxc.records import Record
from agent.drivers.lxc.snapshots import SNAPSHOT_NOTE, Snapshots
from common.errors import Conflict, Unsupported
from common.options import parse_config
from common.reports import ContainerSpec

log = logging.getLogger(__name__)
_MARK = "incomplete"


def volume(container: str) -> str:
    """The volume of a container's files."""
    return f"containers/{container}"


class Containers:
    """The containers of a node as files and records."""

    def __init__(self, host: Host, images: Images, snapshots: Snapshots) -> None:
        self._host = host
        self._images = images
        self._snapshots = snapshots

    async def sweep(self) -> None:
        """Remove what is left of containers whose making a crash has cut short: volumes, reserved addresses."""
        records = self._host.records
        # A record that cannot be read names no card, but its container may have one.
        if records.on_disk() == records.all().keys():
            await self._host.network.keep_only([record.spec.hwaddr for record in records.all().values()])
        for name in self._host.storage.volumes("containers"):
            container = Path(name).name
            if self._host.records.find(container) is not None:
                continue
            if (self._host.storage.path(name) / _MARK).exists():
                await self._remove_volumes(container)
            else:
                log.warning("files of a container that is not there are kept", extra={"container": container})

    async def create(self, spec: ContainerSpec, image: str | None) -> None:
        """From an image that is there, or with an empty root."""
        privileged = self.check(spec)
        if self.present(spec):
            return
        storage = self._host.storage
        if image is None:
            staging, halt_signal = await storage.create(), ""
            root = staging / "rootfs"
            root.mkdir()
            root.chmod(0o755)
            os.chown(root, self._host.owner(privileged), self._host.owner(privileged))
        else:
            halt_signal = self._images.traits(image, privileged).halt_signal
            staging = await storage.clone(volume_of(image, privileged))
        await self.admit_whole(Record(spec, halt_signal), staging)

    async def copy(self, spec: ContainerSpec, source: str, snapshot: str | None, refresh: bool) -> None:
        """From another container here, which must not change meanwhile, or from its snapshot.

        `refresh`: into one that is there and does not run.
        """
        self.check(spec)
        if self.present(spec) and not refresh:
            return
        there = self._host.records.get(spec.id) if refresh else None
        record, settings = self._host.records.get(source), parse_config(spec.config)
        origin = volume(source) if snapshot is None else self._snapshots.volume(source, snapshot)
        if settings.disk != record.settings.disk:
            limits.check_disk(self._host.storage, origin, settings.disk)
        staging = await self._clone_for(origin, record.settings.privileged, settings.privileged)
        (staging / SNAPSHOT_NOTE).unlink(missing_ok=True)
        if there is not None:
            await self.replace(there, staging)
        else:
            await self.admit_whole(Record(spec, record.halt_signal), staging)

    async def _clone_for(self, origin: str, was_privileged: bool, privileged: bool) -> Path:
        """A staging volume with the same files, owned as this kind of container needs it."""
        storage, host = self._host.storage, self._host
        if was_privileged == privileged:
            return await storage.clone(origin)
        files = archive.pack(storage.path(origin) / "rootfs", host.id_map(was_privileged))
        async with contextlib.aclosing(files):
            return await self.unpacked(files, privileged)

    async def unpacked(self, files: AsyncIterator[bytes], privileged: bool) -> Path:
        """A staging volume with what an archive of `archive.pack` holds."""
        staging = await self._host.storage.create()
        try:
            root, owner = staging / "rootfs", self._host.owner(privileged)
            root.mkdir()
            os.chown(root, owner, owner)
            await archive.unpack_stream(root, self._host.id_map(privileged), files)
        except BaseException:
            await self._host.storage.discard(staging)
            raise
        return staging

    async def admit_whole(self, record: Record, staging: Path, *, moved: bool = False) -> None:
        """`admit`, to its end even when the caller is cancelled."""
        await _whole(self.admit(record, staging, moved=moved))

    async def admit(self, record: Record, staging: Path, *, moved: bool = False) -> None:
        """Make a container of a staging volume; one that was `moved` keeps its machine-id.

        When that fails nothing is left.
        """
        host, spec, settings = self._host, record.spec, record.settings
        try:
            await asyncio.to_thread(self._make_own, staging, record, moved)
            await host.storage.limit_staging(staging, settings.disk)
            lines = host.lines(record)
            await host.storage.delete(volume(spec.id))  # of a container whose record was removed by hand
            await host.network.reserve(spec.id, spec.hwaddr, spec.hostname)
            await host.storage.commit(staging, volume(spec.id))
            await host.records.create(record, lines)
        except BaseException:
            await host.storage.discard(staging)
            if host.records.find(spec.id) is None:
                await host.network.release(spec.hwaddr)
                await host.storage.delete(volume(spec.id))
            raise
        (host.storage.path(volume(spec.id)) / _MARK).unlink()

    async def replace(self, record: Record, staging: Path) -> None:
        """Give a stopped container the files of a staging volume; its names, limits and machine-id stay."""
        await _whole(self._replace(record, staging))

    async def _replace(self, record: Record, staging: Path) -> None:
        host, container = self._host, record.spec.id
        owner, old, new = host.owner(record.settings.privileged), host.rootfs(container), staging / "rootfs"
        try:
            await asyncio.to_thread(rootfs.set_hostname, new, record.spec.hostname, owner)
            await asyncio.to_thread(rootfs.keep_machine_id, new, old, owner)
            halt_signal = await asyncio.to_thread(rootfs.halt_signal, new)
            await host.storage.limit_staging(staging, record.settings.disk)
            await host.storage.commit(staging, volume(container))
        except BaseException:
            await host.storage.discard(staging)
            raise
        changed = Record(record.spec, halt_signal, record.cpus)
        await host.records.save(changed, host.lines(changed))

    def _make_own(self, staging: Path, record: Record, moved: bool) -> None:
        owner = self._host.owner(record.settings.privileged)
        (staging / _MARK).touch()
        rootfs.set_hostname(staging / "rootfs", record.spec.hostname, owner)
        if not moved:
            rootfs.renew_machine_id(staging / "rootfs", owner)

    def present(self, spec: ContainerSpec) -> bool:
        """Whether just this container is there. Raises Conflict for another one of its id."""
        there = self._host.records.find(spec.id)
        if there is None and not self._host.records.path(spec.id).exists():
            return False
        if there is not None and there.spec.generation == spec.generation:
            return True
        raise Conflict(f"container {spec.id} exists already")

    def check(self, spec: ContainerSpec) -> bool:
        """Whether it is privileged. Raises Unsupported or InvalidRequest for what cannot be had on this node."""
        settings = parse_config(spec.config)
        if settings.disk is not None and not self._host.storage.disk_limits:
            reason = f"storage {self._host.storage.name!r} cannot hold a disk limit; btrfs can"
            raise Unsupported(reason, field="config.limits.disk")
        self._host.cpus.choose(settings.cpus, ())
        return settings.privileged

    async def convert(self, old: Record, new: Record) -> None:
        """Give a stopped container's files and snapshots to the ids of the other kind of container."""
        for name in [
            *(self._snapshots.volume(old.spec.id, one.name) for one in self._snapshots.all(old.spec.id)),
            volume(old.spec.id),
        ]:
            staging = await self._clone_for(name, old.settings.privileged, new.settings.privileged)
            note = self._host.storage.path(name) / SNAPSHOT_NOTE
            if note.exists():
                (staging / SNAPSHOT_NOTE).write_bytes(note.read_bytes())
            if name == volume(old.spec.id):
                await self._host.storage.limit_staging(staging, new.settings.disk)
            await self._host.storage.commit(staging, name)

    async def rename(self, container: str, spec: ContainerSpec) -> None:
        """Give a stopped container another id."""
        host = self._host
        there = host.records.find(spec.id)
        if there is not None and there.spec == spec and host.records.find(container) is None:
            # Undone after a crash in the middle, the record has this id already and the volumes may not.
            if any(host.storage.path(volume(name)).is_dir() for name in (container, spec.id)):
                await _whole(self._rename_volumes(container, spec.id))
            return
        record = host.records.get(container)
        if host.records.path(spec.id).exists():
            raise Conflict(f"container {spec.id} exists already")
        await _whole(self._rename(record, Record(spec, record.halt_signal, record.cpus)))

    async def _rename(self, old: Record, new: Record) -> None:
        host = self._host
        lines = host.lines(new)
        await host.network.reserve(new.spec.id, new.spec.hwaddr, new.spec.hostname)
        # Volumes first: repeated after a crash, this goes on where it stopped.
        await self._rename_volumes(old.spec.id, new.spec.id)
        owner = host.owner(new.settings.privileged)
        rootfs.set_hostname(host.rootfs(new.spec.id), new.spec.hostname, owner)
        await host.records.rename(old.spec.id, new, lines)
        if old.spec.hwaddr != new.spec.hwaddr:
            await host.network.release(old.spec.hwaddr)

    async def _rename_volumes(self, old: str, new: str) -> None:
        """Rename what still has the old name. Raises DriverFailed when there are no files under either."""
        storage = self._host.storage
        await storage.rename(volume(old), volume(new))
        if storage.volumes(f"snapshots/{old}"):
            await storage.rename(f"snapshots/{old}", f"snapshots/{new}")

    async def delete(self, container: str) -> None:
        """Remove a stopped container with all that belongs to it. Repeated after a crash, it goes on."""
        await _whole(self._delete(container))

    async def _delete(self, container: str) -> None:
        host = self._host
        record = host.records.find(container)
        await self._remove_volumes(container)
        if record is not None:
            await host.network.release(record.spec.hwaddr)
        await commands.sweep(host.cgroups, host.config.cgroup, container, host.veth(container))
        await host.records.remove(container)

    async def _remove_volumes(self, container: str) -> None:
        for name in self._host.storage.volumes(f"snapshots/{container}"):
            await self._host.storage.delete(name)
        await self._host.storage.delete(volume(container))


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    """Do some short steps to their end even when the caller is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:
            log.warning("cut short", exc_info=task.exception())
        raise
