"""The agent's parts put together for tests: a fake driver, a journal, an executor, without a controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agent.channel.channels import Channels
from agent.config import AgentConfig
from agent.drivers.fake import FakeDriver
from agent.executor import Executor
from agent.handlers import Node
from agent.https import HttpsClient, unverified_context
from agent.images import Images
from agent.journal import Journal
from agent.publishing import Publishing
from agent.sampler import Sampler
from agent.transfers import Transfers
from common import keys
from common.clock import ManualClock
from common.commands import AnyArguments
from common.keys import KeyPair
from common.messages import AgentMessage, Command, Result
from common.reports import ContainerReport, ContainerSpec
from tests.helpers.cluster import free_port

SESSION, EPOCH = "session-1", 5


def spec(id: str = "101", generation: int = 1, **config: str) -> ContainerSpec:
    """A container's description; `boot_autostart="true"` becomes the key `boot.autostart`."""
    keys = {key.replace("_", "."): value for key, value in config.items()}
    return ContainerSpec(id, generation, f"host-{id}", "00:16:3e:00:00:01", keys)


@dataclass
class Parts:
    """What a test works with. `sent` is all that went to the link."""

    config: AgentConfig
    clock: ManualClock
    driver: FakeDriver
    journal: Journal
    executor: Executor
    images: Images
    sent: list[AgentMessage] = field(default_factory=list)
    told: list[tuple[ContainerReport, bool]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    keys: KeyPair = field(default_factory=keys.generate)
    data_port: int = 0

    def command(self, id: str, arguments: AnyArguments, **changed: object) -> Command:
        """A command of the current session that is good for a minute; `changed` replaces fields of it."""
        fields: dict[str, object] = {
            "id": id,
            "epoch": EPOCH,
            "session": SESSION,
            "generation": 1,
            "expires_at": self.clock.monotonic() + 60,
            "arguments": arguments,
        }
        return Command(**{**fields, **changed})  # type: ignore[arg-type]

    async def result(self, id: str, number: int = 1) -> Result:
        """The result of a command, the `number`th that was sent."""
        async with asyncio.timeout(10):
            while True:
                found = [m for m in self.sent if isinstance(m, Result) and m.command == id]
                if len(found) >= number:
                    return found[number - 1]
                self.arrived.clear()
                await self.arrived.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that was sent makes the condition true."""
        async with asyncio.timeout(10):
            while not condition():
                self.arrived.clear()
                await self.arrived.wait()

    async def do(self, id: str, arguments: AnyArguments, **changed: object) -> Result:
        """Have a command carried out; its (next) result."""
        before = sum(isinstance(m, Result) and m.command == id for m in self.sent)
        self.executor.receive(self.command(id, arguments, **changed))
        return await self.result(id, before + 1)

    def effects(self) -> list[str]:
        """The real effects so far: `container.create 101 op/1/do`."""
        file = self.driver.effects_file
        return file.read_text().splitlines() if file.exists() else []


@asynccontextmanager
async def agent_parts(
    state: Path,
    *,
    api: str = "https://127.0.0.1:1",
    clock: ManualClock | None = None,
    parallel: int = 16,
    boot_id: str = "boot-1",
) -> AsyncIterator[Parts]:
    """The parts, with a session begun; everything is closed at the end."""
    config = AgentConfig(state=state, node="node1", driver="fake", api=api)
    clock = clock or ManualClock()
    sent: list[AgentMessage] = []
    arrived = asyncio.Event()

    def send(message: AgentMessage) -> None:
        sent.append(message)
        arrived.set()

    driver = FakeDriver(config, clock, boot_id=lambda: boot_id)
    client = HttpsClient(api, unverified_context(), timeout=5)
    sampler = Sampler(driver, clock, lambda _samples: None, asyncio.Event(), 60)
    journal = Journal(state / "journal.db", clock)
    images = Images(driver, client, state / "images", backoff=lambda _attempt: 0.01)
    pair, port = keys.generate(), free_port()
    channels = Channels(pair, client, port)
    node = Node(driver, images, Transfers(driver, channels), Publishing(driver, client), sampler)
    executor = Executor(node, journal, clock, send, parallel=parallel)
    parts = Parts(config, clock, driver, journal, executor, images, sent, arrived=arrived, keys=pair, data_port=port)
    await journal.open()
    images.open()
    await driver.open(lambda report, gone: parts.told.append((report, gone)))
    await executor.begin_session(SESSION, EPOCH)
    try:
        yield parts
    finally:
        await executor.close()
        sampler.close()
        await channels.close()
        client.close()
        await driver.close()
        await journal.close()
