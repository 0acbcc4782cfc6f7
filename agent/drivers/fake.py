"""A driver whose containers are only written down: for tests, and for trying a large fleet on one machine.

It keeps the contract of `Driver` in full. In `<state>/fake/` stand `world.json` (what exists, found again by the next
run), `script.json` (delays and faults, see `Script`) and `effects` (one line for every real effect: command, container,
id of the agent's command; a call that finds its work done already writes none).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from agent.channel.base import Channel
from agent.config import AgentConfig
from agent.drivers import fake_transfers
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
from agent.drivers.fake_image import fake_image
from agent.drivers.fake_node import FakeNode
from agent.drivers.fake_samples import sample_container, sample_node
from agent.drivers.fake_state import FakeContainer, FakeImage, FakeSnapshot, Script
from agent.identity import read_boot_id
from common import VERSION
from common.clock import Clock
from common.errors import Conflict, DeadlinePassed, InvalidRequest, NotFound
from common.options import parse_config
from common.reports import ContainerReport, ContainerSample, ContainerSpec, ImageReport, NodeFacts, NodeSample
from common.states import Status
from common.tasks import Tasks


class FakeDriver(Driver):
    """Keeps containers in memory and, when `persist`, in a file. `boot_id` tells one boot of the host from the next."""

    name = "fake"

    def __init__(
        self,
        config: AgentConfig,
        clock: Clock,
        *,
        persist: bool = True,
        boot_id: Callable[[], str] = read_boot_id,
    ) -> None:
        self._clock = clock
        self._boot_id = boot_id
        self._subnet = config.subnet
        self._id_map = f"{config.first_id}:{config.id_count}"
        self._node = FakeNode(config.state / "fake", persist)
        self._listener: StateListener | None = None
        self._deaths = Tasks("fake driver")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(disk_limits=True, snapshots=True, privileged=True, transfers=True)

    @property
    def effects_file(self) -> Path:
        """Where every real effect stands, a line each."""
        return self._node.effects_file

    @property
    def script(self) -> Script:
        """How it behaves; may be changed in place."""
        return self._node.script

    async def open(self, listener: StateListener) -> None:
        self._node.open(self._boot_id())
        self._listener = listener

    async def close(self) -> None:
        await self._deaths.close()
        self._listener = None

    async def shut_down(self) -> None:
        self._node.stop_all()

    async def purge(self) -> None:
        self._node.remove()

    async def facts(self) -> NodeFacts:
        return NodeFacts(
            hostname=socket.gethostname()[:128],
            architecture=os.uname().machine,
            cpus=self.script.cpus,
            memory=self.script.memory,
            disk=self.script.disk,
            driver=self.name,
            driver_version=VERSION,
            storage="btrfs",
            kernel=os.uname().release[:128],
            cgroup="none",
            agent_version=VERSION,
            subnet=self._subnet,
            capabilities=("disk_limits", "snapshots", "privileged", "transfers"),
            id_map=self._id_map,
        )

    async def containers(self) -> list[ContainerReport]:
        return [container.report() for container in self._node.world.containers.values()]

    async def inspect(self, container: str) -> ContainerReport:
        return self._node.find(container).report()

    async def images(self) -> list[ImageReport]:
        return self._node.world.image_reports()

    async def has_image(self, fingerprint: str, privileged: bool) -> bool:
        image = self._node.world.images.get(fingerprint)
        return image is not None and _kind(privileged) in image.kinds

    async def unpack_image(
        self, fingerprint: str, layout: str, file: Path, privileged: bool, report: ReportProgress, offset: int = 0
    ) -> None:
        if layout not in ("unified", "rootfs", "split"):
            raise InvalidRequest(f"unknown image layout {layout!r}", field="layout", allowed="unified, rootfs or split")
        if offset > file.stat().st_size:
            raise InvalidRequest("the image ends before its root file system", field="offset")
        report("unpacking", 0)
        await self._node.reach("image.ensure", fingerprint)
        if await self.has_image(fingerprint, privileged):
            return
        image = self._node.world.images.setdefault(fingerprint, FakeImage(file.stat().st_size, []))
        image.kinds.append(_kind(privileged))
        self._node.done("image.ensure", fingerprint)

    async def drop_image(self, fingerprint: str) -> None:
        await self._node.reach("image.drop", fingerprint)
        if self._node.world.images.pop(fingerprint, None) is not None:
            self._node.done("image.drop", fingerprint)

    async def create(self, spec: ContainerSpec, image: str | None) -> None:
        await self._node.reach("container.create", spec.id)
        if self._node.present(spec):
            return
        if image is not None and not await self.has_image(image, parse_config(spec.config).privileged):
            raise NotFound(f"image {image} is not unpacked on this node", field="image")
        self._node.add("container.create", spec, f"image {image}" if image else "empty", [])

    async def copy(self, spec: ContainerSpec, source: str, snapshot: str | None, refresh: bool = False) -> None:
        await self._node.reach("container.copy", spec.id)
        there = self._node.find(spec.id) if refresh else None
        if there is not None and there.running:
            raise Conflict(f"container {spec.id} is running")
        present = self._node.present(spec)
        if there is not None:
            fake_transfers.refresh(self._node, "container.copy", there, self._node.content(source, snapshot), [])
        elif not present:
            self._node.add("container.copy", spec, self._node.content(source, snapshot), [])

    async def send(self, what: Outgoing, channel: Channel, report: ReportTransfer) -> None:
        await fake_transfers.send(self._node, what, channel, report)

    async def receive(self, what: Incoming, channel: Channel) -> None:
        await fake_transfers.receive(self._node, what, channel)

    async def end_transfer(self, transfer: str) -> None:
        await fake_transfers.end(self._node, transfer)

    async def publish(self, what: Publication) -> AsyncIterator[bytes]:
        """Never compressed."""
        await self._node.reach("image.publish", what.container)
        if what.snapshot is None and self._node.find(what.container).running and not what.force:
            raise Conflict(f"container {what.container} is running")
        yield fake_image(what.metadata, self._node.content(what.container, what.snapshot))

    async def delete(self, container: str, force: bool) -> None:
        await self._node.reach("container.delete", container)
        found = self._node.world.containers.get(container)
        if found is None:
            return
        if found.running and not force:
            raise Conflict(f"container {container} is running")
        del self._node.world.containers[container]
        self._node.done("container.delete", container)

    async def start(self, container: str) -> None:
        await self._node.reach("container.start", container)
        found = self._node.find(container)
        if found.status == Status.RUNNING:
            return
        if found.started_at is None:
            found.started_at = self._clock.now().timestamp()
            self._plan_death(container)
        found.status, found.altered = Status.RUNNING, {}
        self._node.done("container.start", container)

    async def stop(self, container: str, timeout: float, force: bool) -> None:
        await self._node.reach("container.stop", container)
        if not self._node.find(container).running:
            return
        if not force and container in self.script.stubborn:
            await asyncio.sleep(timeout)
            raise DeadlinePassed(f"container {container} did not stop within {timeout:g} s")
        self._node.find(container).stop()
        self._node.done("container.stop", container)

    async def freeze(self, container: str) -> None:
        await self._set_frozen("container.freeze", container, Status.FROZEN)

    async def unfreeze(self, container: str) -> None:
        await self._set_frozen("container.unfreeze", container, Status.RUNNING)

    async def update(self, spec: ContainerSpec) -> None:
        await self._node.reach("container.update", spec.id)
        found = self._node.find(spec.id)
        if found.spec != spec or found.altered:
            found.spec, found.altered = spec, {}
            self._node.done("container.update", spec.id)

    async def rename(self, container: str, spec: ContainerSpec) -> None:
        await self._node.reach("container.rename", container)
        there = self._node.world.containers.get(spec.id)
        if container not in self._node.world.containers and there is not None and there.spec == spec:
            return
        found = self._node.find(container)
        if found.spec == spec:
            return
        if spec.id != container:
            if found.running:
                raise Conflict(f"container {container} is running")
            if there is not None:
                raise Conflict(f"container {spec.id} exists already")
        del self._node.world.containers[container]
        found.spec = spec
        self._node.world.containers[spec.id] = found
        self._node.done("container.rename", container)

    async def adopt(self, spec: ContainerSpec, found: int) -> None:
        await self._node.reach("container.adopt", spec.id)
        there = self._node.find(spec.id)
        if there.spec == spec:
            return
        if there.spec.generation != found:
            raise Conflict(f"container {spec.id} is of generation {there.spec.generation}", field="generation")
        if found == 0 and there.running:
            raise Conflict(f"container {spec.id} is running")
        there.before, there.spec = there.spec, spec
        self._node.done("container.adopt", spec.id)

    async def settle_adoption(self, container: str, keep: bool) -> None:
        await self._node.reach("container.settle", container)
        there = self._node.world.containers.get(container)
        if there is not None and there.before is not None:
            there.spec = there.spec if keep else there.before
            there.before = None
            self._node.done("container.settle", container)

    async def create_snapshot(self, container: str, snapshot: str) -> None:
        await self._node.reach("snapshot.create", container)
        found = self._node.find(container)
        if found.snapshot(snapshot) is None:
            found.snapshots.append(FakeSnapshot(snapshot, self._clock.now().timestamp(), found.content))
            self._node.done("snapshot.create", container)

    async def delete_snapshot(self, container: str, snapshot: str) -> None:
        await self._node.reach("snapshot.delete", container)
        found = self._node.world.containers.get(container)
        taken = found.snapshot(snapshot) if found is not None else None
        if found is not None and taken is not None:
            found.snapshots.remove(taken)
            self._node.done("snapshot.delete", container)

    async def restore_snapshot(self, container: str, snapshot: str) -> None:
        await self._node.reach("snapshot.restore", container)
        found = self._node.find(container)
        if found.running:
            raise Conflict(f"container {container} is running")
        content = self._node.content(container, snapshot)
        if found.content != content:
            found.content = content
            self._node.done("snapshot.restore", container)

    async def rename_snapshot(self, container: str, snapshot: str, new: str) -> None:
        await self._node.reach("snapshot.rename", container)
        found = self._node.find(container)
        taken, there = found.snapshot(snapshot), found.snapshot(new)
        if taken is None and there is None:
            raise NotFound(f"container {container} has no snapshot {snapshot}")
        if taken is not None and there is not None and taken is not there:
            raise Conflict(f"container {container} has a snapshot {new} already")
        if taken is not None and there is None:
            taken.name = new
            self._node.done("snapshot.rename", container)

    def sample_node(self) -> NodeSample:
        now = self._clock.now().timestamp()
        return sample_node(list(self._node.world.containers.values()), self.script, now, self._clock.monotonic())

    def sample(self, containers: list[str] | None = None) -> list[ContainerSample]:
        now = self._clock.now().timestamp()
        every = dict(self._node.world.containers)
        chosen = [every[name] for name in containers if name in every] if containers is not None else every.values()
        return [sample_container(container, self.script, now) for container in chosen]

    def write(self, container: str, content: str) -> None:
        """Change a container's files, as something inside it would."""
        self._node.find(container).content = content
        self._node.save()

    def die(self, container: str) -> None:
        """Have a container end by itself: the listener hears of it."""
        if self._node.find(container).running:
            self._node.find(container).stop()
            self._node.save()
            self._tell(self._node.find(container), gone=False)

    def wake(self, container: str) -> None:
        """Have a container started by hand on the host: the listener hears of it."""
        found = self._node.find(container)
        found.status, found.started_at = Status.RUNNING, self._clock.now().timestamp()
        self._node.save()
        self._tell(found, gone=False)

    def alter(self, container: str, key: str, found: str | None) -> None:
        """Have a limit (a configuration key) changed by hand on the host: the listener hears of it."""
        self._node.find(container).altered[key] = found
        self._node.save()
        self._tell(self._node.find(container), gone=False)

    def appear(self, container: str, spec: ContainerSpec | None = None, status: Status = Status.STOPPED) -> None:
        """Have a container made by hand on the host, or (with `spec`) one that was left behind; the listener hears."""
        made = FakeContainer(spec or ContainerSpec(container, 0, "", "", {}), status, "made by hand")
        self._node.world.containers[container] = made
        self._node.save()
        self._tell(made, gone=False)

    def vanish(self, container: str) -> None:
        """Have a container removed by hand on the host: the listener hears of it."""
        found = self._node.find(container)
        del self._node.world.containers[container]
        self._node.save()
        self._tell(found, gone=True)

    def _tell(self, container: FakeContainer, gone: bool) -> None:
        if self._listener is not None:
            self._listener(container.report(), gone)

    async def _set_frozen(self, command: str, container: str, wanted: Status) -> None:
        await self._node.reach(command, container)
        found = self._node.find(container)
        if not found.running:
            raise Conflict(f"container {container} is stopped")
        if found.status != wanted:
            found.status = wanted
            self._node.done(command, container)

    def _plan_death(self, container: str) -> None:
        seconds = self.script.lifetimes.get(container, self.script.lifetimes.get("*"))
        born = self._node.find(container).started_at

        async def wait_and_die() -> None:
            await asyncio.sleep(seconds or 0.0)
            found = self._node.world.containers.get(container)
            if found is not None and found.started_at == born:
                self.die(container)

        if seconds is not None:
            self._deaths.start(wait_and_die(), container)


def _kind(privileged: bool) -> str:
    return "privileged" if privileged else "mapped"
