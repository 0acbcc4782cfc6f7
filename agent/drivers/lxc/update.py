"""Changing a container's configuration, at once where it runs; or not at all."""

from __future__ import annotations

import asyncio

from agent.drivers.lxc import limits, rootfs
from agent.drivers.lxc.altered import Alterations
from agent.drivers.lxc.containers import Containers, volume
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.lifecycle import Lifecycle
from agent.drivers.lxc.records import Record
from common.errors import Unsupported
from common.options import Settings
from common.process import run
from common.reports import ContainerSpec

_TIMEOUT = 10.0


class Updater:
    """Writes new configurations."""

    def __init__(self, host: Host, lifecycle: Lifecycle, containers: Containers, alterations: Alterations) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._containers = containers
        self._alterations = alterations

    async def update(self, spec: ContainerSpec) -> None:
        """Make `spec` a container's configuration. Raises Conflict for what a running container cannot change."""
        old = self._host.records.get(spec.id)
        altered = {difference.key for difference in self._alterations.find(old)}
        if old.spec == spec and not altered:
            return
        new = Record(spec, old.halt_signal, old.cpus)
        settings = new.settings
        running = self._lifecycle.pid(spec.id) is not None
        if old.settings.cpus != settings.cpus or not running:
            pinned = self._lifecycle.pinned(but=spec.id)
            new = Record(spec, old.halt_signal, self._host.cpus.choose(settings.cpus, pinned))
        if old.settings.privileged != settings.privileged:
            self._lifecycle.require_stopped(spec.id)
            await self._containers.convert(old, new)
        lines = self._host.lines(new)
        await self._limit_disk(spec.id, old.settings.disk, settings)
        try:
            if running:
                self._apply(old, new)
                if altered:
                    limits.enforce(self._host.cgroup(spec.id), new.settings, new.cpus, self._host.memory)
            if "limits.disk" in altered:
                await self._host.storage.set_limit(volume(spec.id), settings.disk)
            await self._rename(old.spec, spec, settings.privileged)
            await self._host.records.save(new, lines)
        except BaseException:
            await self._limit_disk(spec.id, settings.disk, old.settings)
            raise

    def _apply(self, old: Record, new: Record) -> None:
        before, after = (old.settings, old.cpus), (new.settings, new.cpus)
        limits.apply(self._host.cgroup(new.spec.id), before, after, self._host.memory)

    async def _limit_disk(self, container: str, old: int | None, settings: Settings) -> None:
        storage = self._host.storage
        if old == settings.disk:
            return
        if not storage.disk_limits:
            reason = f"storage {storage.name!r} cannot hold a disk limit; btrfs can"
            raise Unsupported(reason, field="config.limits.disk")
        limits.check_disk(storage, volume(container), settings.disk)
        await storage.set_limit(volume(container), settings.disk)

    async def _rename(self, old: ContainerSpec, new: ContainerSpec, privileged: bool) -> None:
        """Change the name that the container calls itself, and its card's reservation."""
        if (old.hostname, old.hwaddr) == (new.hostname, new.hwaddr):
            return
        await self._host.network.reserve(new.id, new.hwaddr, new.hostname)
        if old.hwaddr != new.hwaddr:
            await self._host.network.release(old.hwaddr)
        owner = self._host.owner(privileged)
        await asyncio.to_thread(rootfs.set_hostname, self._host.rootfs(new.id), new.hostname, owner)
        pid = self._lifecycle.pid(new.id)
        if pid is not None and old.hostname != new.hostname:
            # hostname(1) refuses names that the kernel takes.
            command = ["nsenter", f"--target={pid}", "--uts", "--", "tee", "/proc/sys/kernel/hostname"]
            await run(command, timeout=_TIMEOUT, input=new.hostname.encode())
