"""A host: its disk, its containers and its agent, which may die and come back. The agent is the real one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from agent import app as agent_app
from agent import link as agent_link
from agent.app import Agent
from agent.config import AgentConfig
from agent.context import current_command
from agent.drivers.fake import FakeDriver
from agent.drivers.fake_node import FakeNode
from agent.identity import Identity
from common import VERSION, keys
from common.reports import ImageSpec
from tests.failure.simulation.channels import SimulatedChannels
from tests.failure.simulation.disks import JournalDisk, SimulatedJournal
from tests.failure.simulation.loop import Crash, Process, VirtualClock, this_process
from tests.failure.simulation.network import Network, Wire
from tests.failure.simulation.trace import Trace


@dataclass(frozen=True)
class Effect:
    """Something that really happened on a host: the driver's command, on which container, by which command's id."""

    host: str
    command: str
    target: str
    cause: str


@dataclass
class BootRecord:
    """In which boot the containers were started with their host, kept on the host's disk."""

    boot: str = ""

    def is_new(self, boot_id: str) -> bool:
        return self.boot != boot_id

    def done(self, boot_id: str) -> None:
        self.boot = boot_id


class SimulatedNode(FakeNode):
    """The world below the fake driver: it outlives its agents, takes its time, and tells every effect."""

    def __init__(self, host: Host) -> None:
        super().__init__(Path(host.name), persist=False)
        self._host = host

    def open(self, boot_id: str) -> None:
        if self.world.boot_id != boot_id:
            self.world.boot_id = boot_id
            self.stop_all()

    def refresh_script(self) -> None:
        """Faults change the script in place."""

    async def reach(self, command: str, target: str) -> None:
        await asyncio.sleep(self._host.time_of(command))
        this_process().check()
        fault = self.script.take_fault(command, target, "before")
        if fault is not None:
            raise fault

    def done(self, command: str, target: str) -> None:
        self._host.happened(Effect(self._host.name, command, target, current_command.get()))
        fault = self.script.take_fault(command, target, "after")
        if fault is not None:
            raise fault


class Host:
    """One host of the fleet."""

    def __init__(self, name: str, state: Path, seed: int, network: Network, trace: Trace, clock: VirtualClock) -> None:
        """`state` is a directory with an enrolment's files, which are the same for all hosts."""
        self.name = name
        self._state = state
        self.key = name.ljust(40, "k")
        self.clock = clock
        self.journal = JournalDisk(name, seed)
        self.node = SimulatedNode(self)
        self.boots = BootRecord()
        self.boot = 1
        self.slowness = 1.0
        self.process: Process | None = None
        self.driver: FakeDriver | None = None
        self.on_effect: Callable[[Effect], None] = lambda _: None
        self.faults: list[BaseException] = []
        """What its lives failed with by themselves."""
        self.die_at = 0
        """At how many more points (of those named in the code, and after effects) its agent dies; 0: it does not."""
        self.network = network
        self._trace = trace
        self._chance = random.Random(f"{seed}/host/{name}")

    # ------------------------------------------------------------ its agent

    @property
    def alive(self) -> bool:
        """Whether its agent runs."""
        return self.process is not None and not self.process.dead

    def start(self) -> None:
        """Start its agent, if it does not run."""
        if self.alive:
            return
        self._trace.note("process", f"{self.name} starts")
        self.process = Process(self.name, self)
        self.process.on_death.append(self._died)
        self.process.run(self._live())

    def kill(self) -> None:
        """Its agent is killed; containers run on."""
        if self.process is not None:
            self.process.kill()

    def reboot(self) -> None:
        """The machine goes down: nothing runs on it any more."""
        self.kill()
        self.boot += 1
        for container in self.node.world.containers.values():
            container.stop()

    async def _live(self) -> None:
        config = AgentConfig(state=self._state, node=self.name, controller=self.name, driver="fake", address=self.name)
        identity = Identity(
            version=VERSION,
            boot_id=f"{self.name}-{self.boot}",
            machine_id=self.name,
            instance=f"{self.name}-{self._chance.getrandbits(32):x}",
        )
        self.driver = FakeDriver(config, self.clock, persist=False, boot_id=lambda: identity.boot_id)
        self.driver._node = self.node
        agent = Agent(config, clock=self.clock, driver=self.driver, identity=identity, failpoints=self.reach)
        await agent.run(asyncio.Event())

    def _died(self) -> None:
        if self.process is not None and self.process.fault is not None:
            self.faults.append(self.process.fault)
        self._trace.note("process", f"{self.name} died")
        if self.name not in self.network.cut:
            self.network.sever_host(self.name)

    # ------------------------------------------------------------ what happens on it

    def time_of(self, command: str) -> float:
        """Seconds that the driver takes for a command."""
        quick = self._chance.uniform(0.002, 0.05)
        return self.slowness * (quick if self._chance.random() < 0.9 else self._chance.uniform(0.1, 1.0))

    def happened(self, effect: Effect) -> None:
        """An effect; its agent may die before it can say so."""
        self._trace.note("effect", f"{effect.host} {effect.command} {effect.target} by {effect.cause}")
        self.on_effect(effect)
        self.reach("effect")

    def reach(self, point: str) -> None:
        """A point at which its agent may die."""
        process = this_process()
        process.check()
        if self.die_at:
            self.die_at -= 1
            if not self.die_at:
                self._trace.note("fault", f"{self.name} dies at {point}")
                process.kill()
                raise Crash(point)


class SimulatedImages:
    """The agent's images: fetched from the controller if it can be reached, without any bytes."""

    def __init__(self, driver: FakeDriver, _client: object, _directory: Path) -> None:
        self._driver = driver
        self._host: Host = this_process().owner

    def open(self) -> None:
        """There is no directory."""

    async def ensure(self, image: ImageSpec, privileged: bool, report: Any) -> int:
        if await self._driver.has_image(image.fingerprint, privileged):
            return 0
        self._host.network.check_reach(self._host.name)
        await asyncio.sleep(self._host.time_of("image.fetch"))
        self._host.network.check_reach(self._host.name)
        await self._driver.unpack_image(image.fingerprint, image.layout, Path(__file__), privileged, report)
        return image.size

    async def drop(self, fingerprint: str) -> None:
        await self._driver.drop_image(fingerprint)


@contextmanager
def simulated_hosts(network: Network) -> Iterator[None]:
    """Have the agent's parts that touch the machine replaced: journal file, TLS, images, channels, socket."""

    def connect(_context: object, address: str, *_keys: object) -> Wire:
        host: Host = this_process().owner
        return network.connect(address, host.key)

    def journal(_path: Path, clock: Any) -> SimulatedJournal:
        process = this_process()
        return SimulatedJournal(process.owner.journal, process, clock)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(agent_link, "Connection", connect))
        stack.enter_context(mock.patch.object(agent_link.zmq.asyncio, "Context", mock.Mock))
        stack.enter_context(mock.patch.object(keys, "load", lambda _path: keys.KeyPair("p" * 40, "s" * 40)))
        stack.enter_context(
            mock.patch.multiple(
                agent_app,
                Journal=journal,
                Images=SimulatedImages,
                Channels=SimulatedChannels,
                HttpsClient=mock.Mock,
                pinned_context=mock.Mock(),
                boot_record=lambda _config: this_process().owner.boots,
            )
        )
        yield
