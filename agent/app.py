"""The agent as a whole: builds its parts, joins them, starts and stops them in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent.addresses import transfer_address
from agent.autostart import Autostart, BootRecord
from agent.channel.channels import Channels
from agent.config import AgentConfig
from agent.drivers import create_driver
from agent.drivers.base import Driver
from agent.executor import Executor
from agent.handlers import Node
from agent.https import HttpsClient, pinned_context
from agent.identity import Identity, read_identity
from agent.images import Images
from agent.journal import Journal
from agent.link import Link
from agent.publishing import Publishing
from agent.sampler import Sampler
from agent.transfers import Transfers
from common import codec, instance, keys
from common.clock import Clock, SystemClock
from common.errors import TooLarge
from common.failpoints import FailPoints, never
from common.messages import Command, Inventory, StateChanged, Welcome
from common.reports import ContainerReport
from common.states import Status
from common.tasks import Tasks

log = logging.getLogger(__name__)
STOP_WITHIN = 1.5
"""Seconds which commands under way have to let go when the agent stops."""


class Agent:
    """One node's agent. Implements `LinkHandler`: what the controller says goes to the part that it concerns."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        clock: Clock | None = None,
        driver: Driver | None = None,
        identity: Identity | None = None,
        failpoints: FailPoints = never,
        at_end: Callable[[Driver], Awaitable[None]] | None = None,
    ) -> None:
        """`at_end` is done last, before the driver is closed.

        Raises OSError, ValueError or Forbidden when the files of the enrolment are missing or wrong.
        """
        clock = clock or SystemClock()
        identity = identity or read_identity()
        state = config.state
        self._config = config
        self._at_end = at_end
        self._tasks = Tasks("agent")
        self._journal = Journal(state / "journal.db", clock)
        self._driver = driver or create_driver(config, clock)
        self._client = HttpsClient(config.api, pinned_context((state / "ca.crt").read_text(encoding="ascii")))
        self._images = Images(self._driver, self._client, state / "images")
        pair = keys.load(state / "agent.key")
        self._channels = Channels(pair, self._client, config.data_port)
        self._link = Link(
            config.controller,
            pair,
            (state / "controller.pub").read_text(encoding="ascii").strip(),
            identity,
            clock,
            self,
            seen=self._journal.highest,
        )
        self._sampler = Sampler(self._driver, clock, self._link.offer, self._link.connected, config.sample_interval)
        transfers = Transfers(self._driver, self._channels)
        publishing = Publishing(self._driver, self._client)
        node = Node(self._driver, self._images, transfers, publishing, self._sampler)
        self._executor = Executor(node, self._journal, clock, self._link.send, failpoints=failpoints)
        self._autostart = Autostart(
            self._driver,
            self._executor,
            boot_record(config),
            identity.boot_id,
            self._tell,
            config.autostart_delay,
        )

    async def start(self) -> None:
        """Make the node ready, then speak with the controller."""
        await self._journal.open()
        self._images.open()
        await self._driver.open(self._changed)
        self._tasks.start(self._sampler.run(), "sampler")
        self._tasks.start(self._sampler.follow_young(), "young")
        self._tasks.start(self._autostart.run(), "autostart")
        log.info("the agent runs", extra={"node": self._config.node, "driver": self._driver.name})

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set; containers are not touched by the agent's end."""
        try:
            await self.start()
            link = self._tasks.start(self._link.run(), "link")
            stopping = self._tasks.start(stop.wait(), "stop")
            await asyncio.wait({link, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if link.done():
                link.result()
        finally:
            await self.close()

    async def close(self) -> None:
        """End everything that the agent runs for itself, in the reverse order."""
        self._channels.leave()
        try:
            async with asyncio.timeout(STOP_WITHIN):
                await self._executor.close()
                await self._tasks.close()
        except TimeoutError:
            log.warning("a command does not let go: the agent stops without waiting for it")
        self._sampler.close()
        await self._channels.close()
        self._client.close()
        if self._at_end is not None:
            await self._at_end(self._driver)
        await self._driver.close()
        await self._journal.close()
        log.info("the agent has stopped")

    async def welcomed(self, welcome: Welcome) -> None:
        """A session begins."""
        if welcome.node != self._config.node:
            log.warning("the controller calls this node otherwise", extra={"node": welcome.node})
        self._sampler.set_interval(welcome.sample_interval)
        await self._executor.begin_session(welcome.session, welcome.epoch)

    async def inventory(self) -> Inventory:
        """All that the node has; without the configurations where they would not fit into a message."""
        facts = msgspec.structs.replace(
            await self._driver.facts(), transfer_address=await transfer_address(self._config)
        )
        containers = tuple(await self._driver.containers())
        inventory = Inventory(facts, containers, tuple(await self._driver.images()))
        try:
            codec.encode(inventory)
        except TooLarge:
            log.warning("the inventory is told without configurations", extra={"containers": len(containers)})
            bare = tuple(msgspec.structs.replace(container, config={}, bare=True) for container in containers)
            return msgspec.structs.replace(inventory, containers=bare)
        return inventory

    def lost(self) -> None:
        """The session is over."""
        self._executor.end_session()

    def command(self, command: Command) -> None:
        """An order came."""
        self._executor.receive(command)

    def acknowledged(self, commands: tuple[str, ...]) -> None:
        """The controller has committed these results."""
        self._executor.acknowledged(commands)

    def abandoned(self, command: str) -> None:
        """A command is to be given up."""
        self._executor.abandon(command)

    def confirmed(self, generations: dict[str, int]) -> None:
        """The controller's word which containers belong to this node."""
        self._autostart.confirm(generations)

    def _changed(self, container: ContainerReport, removed: bool) -> None:
        self._tell(StateChanged(container, removed))

    def _tell(self, change: StateChanged) -> None:
        """What no command asked for; one that has started by itself gets an address soon, too."""
        if change.container.status == Status.RUNNING and not change.removed:
            self._sampler.follow(change.container.id)
        self._link.send(change)


def boot_record(config: AgentConfig) -> BootRecord:
    """Where the last boot stands in which containers were started with their host."""
    return BootRecord(config.state / "last-boot")


@contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Hold the state directory's lock. Raises Conflict while an agent runs in it."""
    with instance.only_one(state / "agent.lock", "an agent"):
        yield
