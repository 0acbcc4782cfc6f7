"""Runs containers by LXC: unprivileged by default, on btrfs where it can be had, in cgroups of any version."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
from collections.abc import AsyncIterator
from pathlib import Path

from agent.cgroups import Cgroups
from agent.channel.base import Channel
from agent.config import AgentConfig
from agent.drivers.base import (
    Capabilities,
    Driver,
    Incoming,
    Outgoing,
    Publication,
    ReportProgress,
    ReportTransfer,
    StateListener,
)
from agent.drivers.lxc import commands, ids, teardown
from agent.drivers.lxc.adoption import Adoption
from agent.drivers.lxc.altered import Alterations
from agent.drivers.lxc.containers import Containers, volume
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.images import Images
from agent.drivers.lxc.lifecycle import Lifecycle, Listener
from agent.drivers.lxc.publishing import Publisher
from agent.drivers.lxc.records import Record
from agent.drivers.lxc.snapshots import Snapshots
from agent.drivers.lxc.strangers import Strangers
from agent.drivers.lxc.transfers import rsync
from agent.drivers.lxc.transfers.places import transfer_volume
from agent.drivers.lxc.transfers.receiving import Receiver
from agent.drivers.lxc.transfers.sending import Sender, Still
from agent.drivers.lxc.update import Updater
from agent.metrics.containers import ContainerSampler
from agent.metrics.host import NodeLoad, node_facts, sample_node
from agent.network import Network
from agent.storage import open_storage
from common.clock import Clock
from common.errors import Conflict, DriverFailed
from common.reports import ContainerReport, ContainerSample, ContainerSpec, ImageReport, NodeFacts, NodeSample
from common.states import Status

log = logging.getLogger(__name__)


class _Parts:
    """What an open driver is made of."""

    def __init__(
        self, host: Host, clock: Clock, lifecycle: Lifecycle, heard: Listener, listener: StateListener, still: Still
    ) -> None:
        self.host = host
        self.lifecycle = lifecycle
        self.strangers = Strangers(host.records, lifecycle.is_commanded, listener)
        self.images = Images(host)
        self.snapshots = Snapshots(host, clock)
        self.containers = Containers(host, self.images, self.snapshots)
        self.alterations = Alterations(
            host,
            lambda container: lifecycle.pid(container) is not None,
            lifecycle.is_commanded,
            lambda container: heard(container, False),
        )
        self.sender = Sender(host, self.snapshots, still)
        self.receiver = Receiver(host, self.containers, self.snapshots)
        self.updater = Updater(host, lifecycle, self.containers, self.alterations)
        self.adoption = Adoption(host, self.containers, self.updater)
        self.publisher = Publisher(host, self.snapshots)
        self.sampler = ContainerSampler(host.cgroups, clock)
        self.load = NodeLoad()


class LxcDriver(Driver):
    """Real containers. Between `open` and `close` all methods work; `shut_down` and `purge` also without."""

    name = "lxc"

    def __init__(self, config: AgentConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._opened: _Parts | None = None
        self._listener: StateListener | None = None

    @property
    def _parts(self) -> _Parts:
        if self._opened is None:
            raise RuntimeError("the driver is not open")
        return self._opened

    @property
    def capabilities(self) -> Capabilities:
        limits = self._parts.host.storage.disk_limits
        return Capabilities(disk_limits=limits, snapshots=True, privileged=True, transfers=rsync.available())

    async def open(self, listener: StateListener) -> None:
        self._listener = listener
        if self._opened is not None:
            return
        config = self._config
        require_passable(config.state)
        cgroups = Cgroups.detect()
        await asyncio.to_thread(ids.allow, ids.IdMap(config.first_id, config.id_count), config.state / ids.MARK)
        network = Network(config)
        host = Host(config, await open_storage(config), network, cgroups)
        await host.open()
        await network.open()
        parts = _Parts(host, self._clock, Lifecycle(host, self._heard), self._heard, listener, self._still)
        await asyncio.to_thread(parts.adoption.sweep)
        await parts.containers.sweep()
        await parts.lifecycle.open()
        parts.strangers.open()
        parts.alterations.open()
        self._opened = parts
        if not rsync.available():
            log.warning("rsync is missing: containers cannot be moved or copied to or from this node")

    def _heard(self, container: str, gone: bool) -> None:
        if self._listener is not None:
            self._listener(self._report(self._parts.host.records.get(container)), gone)

    async def close(self) -> None:
        if self._opened is None:
            return
        await self._opened.strangers.close()
        await self._opened.alterations.close()
        await self._opened.lifecycle.close()
        await self._opened.host.network.close()
        self._opened.sampler.close()
        self._opened = None
        self._listener = None

    async def shut_down(self) -> None:
        await self.close()
        await teardown.shut_down(self._config)

    async def purge(self) -> None:
        await teardown.purge(self._config)

    async def facts(self) -> NodeFacts:
        host = self._parts.host
        flags = ("disk_limits", "snapshots", "privileged", "transfers")
        return node_facts(
            driver=self.name,
            driver_version=await commands.version(),
            storage=host.storage.name,
            cgroup=host.cgroups.version,
            subnet=host.network.subnet,
            pool=host.storage.pool(),
            capabilities=[flag for flag in flags if getattr(self.capabilities, flag)],
            id_map=str(host.ids),
        )

    async def containers(self) -> list[ContainerReport]:
        records = self._parts.host.records
        reports = []
        for container, record in sorted(records.all().items()):
            if records.find(container) is record:
                reports.append(self._report(record))
            await asyncio.sleep(0)
        return reports + await self._parts.strangers.all()

    async def inspect(self, container: str) -> ContainerReport:
        return self._report(self._parts.host.records.get(container))

    def _report(self, record: Record) -> ContainerReport:
        parts, spec = self._parts, record.spec
        status, reason = parts.lifecycle.status(spec.id), None
        if status == Status.STOPPED and not parts.host.rootfs(spec.id).is_dir():
            status, reason = Status.ERROR, "its files are missing"
        return ContainerReport(
            id=spec.id,
            generation=spec.generation,
            status=status,
            config=spec.config,
            hostname=spec.hostname,
            reason=reason,
            pid=parts.lifecycle.pid(spec.id),
            snapshots=tuple(parts.snapshots.all(spec.id)),
            hwaddr=spec.hwaddr,
            altered=parts.alterations.find(record),
        )

    async def images(self) -> list[ImageReport]:
        return self._parts.images.all()

    async def has_image(self, fingerprint: str, privileged: bool) -> bool:
        return self._parts.images.has(fingerprint, privileged)

    async def unpack_image(
        self, fingerprint: str, layout: str, file: Path, privileged: bool, report: ReportProgress, offset: int = 0
    ) -> None:
        await self._parts.images.unpack(fingerprint, layout, file, privileged, report, offset)

    async def drop_image(self, fingerprint: str) -> None:
        await self._parts.images.drop(fingerprint)

    async def create(self, spec: ContainerSpec, image: str | None) -> None:
        with self._parts.lifecycle.commanded(spec.id):
            await self._parts.containers.create(spec, image)

    async def copy(self, spec: ContainerSpec, source: str, snapshot: str | None, refresh: bool = False) -> None:
        with self._parts.lifecycle.commanded(spec.id):
            if refresh:
                self._parts.lifecycle.require_stopped(spec.id)
            async with self._still(source, snapshot):
                await self._parts.containers.copy(spec, source, snapshot, refresh)

    @contextlib.asynccontextmanager
    async def _still(self, container: str, snapshot: str | None = None) -> AsyncIterator[None]:
        """Hold a running container's processes while its files are copied one by one."""
        parts = self._parts
        changes = snapshot is None and not parts.host.storage.instant
        if not changes or parts.lifecycle.status(container) != Status.RUNNING:
            yield
            return
        await parts.lifecycle.freeze(container)
        try:
            yield
        finally:
            with contextlib.suppress(Conflict):  # it was stopped meanwhile
                await parts.lifecycle.unfreeze(container)

    async def send(self, what: Outgoing, channel: Channel, report: ReportTransfer) -> None:
        lifecycle = self._parts.lifecycle
        if what.moving and what.last:
            lifecycle.require_stopped(what.container)
        running = lifecycle.pid(what.container) is not None
        await self._parts.sender.send(what, running, channel, report)

    async def receive(self, what: Incoming, channel: Channel) -> None:
        lifecycle = self._parts.lifecycle
        with lifecycle.commanded(what.spec.id):
            if what.refresh:
                lifecycle.require_stopped(what.spec.id)
            await self._parts.receiver.receive(what, channel)

    async def end_transfer(self, transfer: str) -> None:
        await self._parts.host.storage.delete(transfer_volume(transfer))

    async def publish(self, what: Publication) -> AsyncIterator[bytes]:
        parts = self._parts
        running = what.snapshot is None and parts.lifecycle.pid(what.container) is not None
        if running and not what.force:
            raise Conflict(f"container {what.container} is running")
        async with contextlib.aclosing(parts.publisher.publish(what, self._still, running)) as pieces:
            async for piece in pieces:
                yield piece

    async def delete(self, container: str, force: bool) -> None:
        parts = self._parts
        with parts.lifecycle.commanded(container):
            parts.host.records.require_readable(container)
            if parts.host.records.find(container) is None and parts.host.records.path(container).exists():
                return  # made by hand: there is nothing of ours
            if parts.lifecycle.pid(container) is not None:
                if not force:
                    raise Conflict(f"container {container} is running")
                await parts.lifecycle.stop_by_force(container)
            await parts.containers.delete(container)
            parts.sampler.forget(container)

    async def start(self, container: str) -> None:
        await self._parts.lifecycle.start(self._parts.host.records.get(container))

    async def stop(self, container: str, timeout: float, force: bool) -> None:
        record = self._parts.host.records.get(container)
        if force:
            await self._parts.lifecycle.stop_by_force(container)
        else:
            await self._parts.lifecycle.stop(record, timeout)

    async def freeze(self, container: str) -> None:
        self._parts.host.records.get(container)
        await self._parts.lifecycle.freeze(container)

    async def unfreeze(self, container: str) -> None:
        self._parts.host.records.get(container)
        await self._parts.lifecycle.unfreeze(container)

    async def update(self, spec: ContainerSpec) -> None:
        with self._parts.lifecycle.commanded(spec.id):
            await self._parts.updater.update(spec)

    async def rename(self, container: str, spec: ContainerSpec) -> None:
        if spec.id == container:
            await self.update(spec)
            return
        lifecycle = self._parts.lifecycle
        with lifecycle.commanded(container), lifecycle.commanded(spec.id):
            lifecycle.require_stopped(container)
            await self._parts.containers.rename(container, spec)
            self._parts.sampler.forget(container)

    async def adopt(self, spec: ContainerSpec, found: int) -> None:
        with self._parts.lifecycle.commanded(spec.id):
            await self._parts.adoption.adopt(spec, found)

    async def settle_adoption(self, container: str, keep: bool) -> None:
        with self._parts.lifecycle.commanded(container):
            await self._parts.adoption.settle(container, keep)

    async def create_snapshot(self, container: str, snapshot: str) -> None:
        self._parts.host.records.get(container)
        async with self._still(container):
            await self._parts.snapshots.create(container, snapshot)

    async def delete_snapshot(self, container: str, snapshot: str) -> None:
        await self._parts.snapshots.delete(container, snapshot)

    async def restore_snapshot(self, container: str, snapshot: str) -> None:
        record = self._parts.host.records.get(container)
        self._parts.lifecycle.require_stopped(container)
        await self._parts.snapshots.restore(record, snapshot)

    async def rename_snapshot(self, container: str, snapshot: str, new: str) -> None:
        self._parts.host.records.get(container)
        await self._parts.snapshots.rename(container, snapshot, new)

    def sample_node(self) -> NodeSample:
        return sample_node(self._parts.host.storage.pool(), self._parts.load)

    def sample(self, containers: list[str] | None = None) -> list[ContainerSample]:
        records = self._parts.host.records.all()
        chosen = records if containers is None else {name: records[name] for name in containers if name in records}
        return [self._sample(record) for record in chosen.values()]

    def _sample(self, record: Record) -> ContainerSample:
        parts, container = self._parts, record.spec.id
        pid, path = parts.lifecycle.pid(container), parts.host.cgroup_path(container)
        disk = parts.host.storage.usage(volume(container))
        return parts.sampler.sample(container, pid, path, record.settings, disk)


def require_passable(state: Path) -> None:
    """Let containers' mapped roots pass through the state directory. Raises DriverFailed where it is not ours to do."""
    for directory in (state, *state.resolve().parents):
        mode = directory.stat().st_mode
        if mode & stat.S_IXOTH:
            continue
        if directory != state:
            raise DriverFailed(f"containers cannot pass through {directory}: chmod o+x {directory}, or another state")
        directory.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
