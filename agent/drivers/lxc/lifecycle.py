"""Starting, stopping and freezing containers, and hearing of what happens to them without us."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Callable, Iterator

from agent.drivers.lxc import commands, freezer, rootfs
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.records import Record
from agent.drivers.lxc.watch import Watch, Watched
from agent.network.daemon import ended, send
from common.errors import Conflict, DeadlinePassed, DriverFailed, VzfleetError
from common.states import Status
from common.tasks import Tasks

log = logging.getLogger(__name__)
TICK = 1.0
"""Seconds between two looks for what was started or removed by hand."""
_FROZEN_EVERY = 5
"""Ticks between two looks for what was frozen or thawed by hand: it needs a look at every container."""
_END_TIMEOUT = 30.0
_ASK_AGAIN = 1.0
_REBOOT_PAUSE = 0.05

Listener = Callable[[str, bool], None]
"""Called with a container's id, and whether it is gone, when something happened that no command did."""


class Lifecycle:
    """The running containers of a node."""

    def __init__(self, host: Host, listener: Listener) -> None:
        self._host = host
        self._listener = listener
        self._watch = Watch(self._init_ended)
        self._tasks = Tasks("containers")
        self._settling: dict[str, asyncio.Task[None]] = {}
        self._commanded: dict[str, int] = {}
        self._frozen: set[str] = set()

    async def open(self) -> None:
        """Find what runs, and look after it from now on."""
        for container in self._host.records.all():
            self._look(container)
        self._frozen = self._find_frozen()
        self._tasks.start(self._look_around(), "look around")

    async def close(self) -> None:
        """Let go of everything; the containers go on."""
        await self._tasks.close()
        self._watch.close()

    def _look(self, container: str) -> bool:
        processes = self._host.finder.find(container)
        return processes is not None and self._watch.add(container, processes)

    @contextlib.contextmanager
    def commanded(self, container: str) -> Iterator[None]:
        """While a command works on a container, its changes are no news."""
        self._commanded[container] = self._commanded.get(container, 0) + 1
        try:
            yield
        finally:
            self._commanded[container] -= 1
            if not self._commanded[container]:
                del self._commanded[container]

    def is_commanded(self, container: str) -> bool:
        """Whether a command works on a container of this id."""
        return container in self._commanded

    def pid(self, container: str) -> int | None:
        """A running container's init, None when it does not run."""
        watched = self._watch.get(container)
        return watched.processes.init if watched is not None else None

    def status(self, container: str) -> Status:
        """Running, Frozen or Stopped."""
        if self._watch.get(container) is None:
            return Status.STOPPED
        return Status.FROZEN if self._host.cgroup(container).frozen() else Status.RUNNING

    def require_stopped(self, container: str) -> None:
        """Raise Conflict when it runs."""
        if self.pid(container) is not None:
            raise Conflict(f"container {container} is running")

    async def start(self, record: Record) -> None:
        """Start it; a frozen one goes on. Raises DriverFailed with the reason; then nothing is left behind."""
        container = record.spec.id
        with self.commanded(container):
            await self._settled(container)
            if self.pid(container) is not None or self._look(container):
                self._thaw(container)
                return
            self._host.moves.expect()
            await self._prepare(record)
            starting = asyncio.ensure_future(self._start(container))
            try:
                await asyncio.shield(starting)
            except asyncio.CancelledError:
                # lxc-start has children that it alone knows: it is let end, then all is taken back.
                await asyncio.wait([starting])
                await self.stop_by_force(container)
                raise

    async def _prepare(self, record: Record) -> None:
        host, spec, settings = self._host, record.spec, record.settings
        root = host.require_files(spec.id)
        await self._sweep(spec.id)
        if host.storage.disk_limits:
            await host.storage.set_limit(f"containers/{spec.id}", settings.disk)
        await self._repair_network()
        await host.network.reserve(spec.id, spec.hwaddr, spec.hostname)
        rootfs.set_hostname(root, spec.hostname, host.owner(settings.privileged))
        cpus = host.cpus.choose(settings.cpus, self.pinned(but=spec.id))
        halt_signal = record.halt_signal or rootfs.halt_signal(root)
        record = Record(spec, halt_signal, cpus)
        await host.records.save(record, host.lines(record))

    async def _repair_network(self) -> None:
        """Where the bridge was removed by hand, make it again and put the cables of those that run into it."""
        if not await self._host.network.repair():
            return
        for container in self._watch.all():
            try:
                await self._host.network.connect(self._host.veth(container))
            except VzfleetError as error:
                log.warning("a container has no network", extra={"container": container, "reason": error.text})

    def pinned(self, but: str) -> list[tuple[int, ...]]:
        """The CPUs that the running containers are pinned to, one left out."""
        records = self._host.records
        running = (records.find(container) for container in self._watch.all() if container != but)
        return [record.cpus for record in running if record is not None]

    async def _start(self, container: str) -> None:
        try:
            await commands.start(self._host.records.directory, container)
        except BaseException:
            await self._sweep(container)
            raise
        if not self._look(container):
            # It ran, and has ended already: that is its own affair.
            await self._sweep(container)

    async def _sweep(self, container: str) -> None:
        host = self._host
        await commands.sweep(host.cgroups, host.config.cgroup, container, host.veth(container))

    async def stop(self, record: Record, timeout: float) -> None:
        """Ask its init to shut down. Raises DeadlinePassed when it still runs after `timeout` seconds."""
        container = record.spec.id
        number = signal.SIGRTMIN + 3 if record.halt_signal == rootfs.SIGRTMIN_3 else signal.SIGPWR
        with self.commanded(container):
            await self._settled(container)
            watched = self._watch.get(container)
            if watched is None:
                return
            try:
                async with asyncio.timeout(timeout):
                    freezer.thaw(self._host.cgroup(container))
                    await self._ask_until_stopped(container, number)
            except TimeoutError:
                raise DeadlinePassed(f"container {container} did not stop within {timeout:g} s") from None

    async def _ask_until_stopped(self, container: str, number: int) -> None:
        """Signal its init, and again: the kernel drops what an init that has just begun does not handle yet."""
        while (watched := self._watch.get(container)) is not None:
            send(watched.init, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ASK_AGAIN):
                    await self._until_stopped(container)

    async def _until_stopped(self, container: str) -> None:
        await self._settled(container)
        # More than once round when it reboots: then it has another init.
        while (watched := self._watch.get(container)) is not None:
            await watched.over.wait()
            await self._settled(container)

    async def _settled(self, container: str) -> None:
        """Wait until what follows the end of an init is done."""
        if container in self._settling:
            await asyncio.wait([self._settling[container]])

    async def stop_by_force(self, container: str) -> None:
        """Kill it. Raises DriverFailed when it does not die."""
        with self.commanded(container):
            await self._settled(container)
            watched = self._watch.get(container)
            if watched is None:
                return await self._sweep(container)
            try:
                async with asyncio.timeout(_END_TIMEOUT):
                    send(watched.init, signal.SIGKILL)
                    freezer.thaw(self._host.cgroup(container))
                    await self._until_stopped(container)
            except TimeoutError:
                raise DriverFailed(f"container {container} does not die") from None

    async def freeze(self, container: str) -> None:
        """Freeze it. Stopped is Conflict."""
        if self.pid(container) is None:
            raise Conflict(f"container {container} is stopped")
        await freezer.freeze(self._host.cgroup(container))
        self._frozen.add(container)

    async def unfreeze(self, container: str) -> None:
        """Let it go on. Stopped is Conflict."""
        if self.pid(container) is None:
            raise Conflict(f"container {container} is stopped")
        self._thaw(container)

    def _thaw(self, container: str) -> None:
        freezer.thaw(self._host.cgroup(container))
        self._frozen.discard(container)

    def _find_frozen(self) -> set[str]:
        return {container for container in self._watch.all() if self._host.cgroup(container).frozen()}

    def _look_for_frozen(self) -> None:
        """Tell of those that were frozen or thawed by hand."""
        before, self._frozen = self._frozen, self._find_frozen()
        for container in (before ^ self._frozen) & self._watch.all().keys() - self._commanded.keys():
            self._listener(container, False)

    def _init_ended(self, container: str, watched: Watched) -> None:
        self._settling[container] = self._tasks.start(self._after_end(container, watched), f"end of {container}")

    async def _after_end(self, container: str, watched: Watched) -> None:
        try:
            await self._settle(container, watched)
        except VzfleetError as error:
            log.error("what a container left cannot be removed", extra={"container": container, "error": error.text})
        finally:
            watched.close()
            del self._settling[container]
        if container not in self._commanded and self._host.records.find(container) is not None:
            self._listener(container, False)

    async def _settle(self, container: str, watched: Watched) -> None:
        """After its init's end: wait until its monitor has cleaned up and ended, or has started it again (reboot)."""
        if watched.monitor is not None:
            while not await _ends_within(watched.monitor, _REBOOT_PAUSE):
                if self._look(container):
                    return
        await self._sweep(container)

    async def _look_around(self) -> None:
        for tick in itertools.count():
            await asyncio.sleep(TICK)
            if tick % _FROZEN_EVERY == 0:
                self._look_for_frozen()
            known = self._watch.all().keys() | self._commanded.keys() | self._settling.keys()
            for container in self._host.finder.names() - known:
                if self._host.records.find(container) is not None and self._look(container):
                    self._listener(container, False)
            for container in self._host.records.all().keys() - self._host.records.on_disk() - self._commanded.keys():
                self._listener(container, True)
                self._host.records.forget(container)


async def _ended(pidfd: int) -> None:
    """Wait for the end of a pidfd's process by a descriptor of our own: the loop watches each only once."""
    own = os.dup(pidfd)
    try:
        await ended(own)
    finally:
        os.close(own)


async def _ends_within(pidfd: int, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await _ended(pidfd)
    except TimeoutError:
        return False
    return True
