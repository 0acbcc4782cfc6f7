"""An agent's end of the link for tests: real CURVE sockets, a journal in memory, no containers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from common.codec import decode_from_controller, encode
from common.keys import KeyPair, generate
from common.messages import (
    Accepted,
    AgentMessage,
    Command,
    Confirm,
    ControllerMessage,
    Heartbeat,
    Hello,
    Inventory,
    Outcome,
    Ping,
    Refused,
    Result,
    ResultAcknowledged,
    Welcome,
)
from common.reports import ContainerReport, NodeFacts

M = TypeVar("M")
FACTS = NodeFacts(
    hostname="host",
    architecture="x86_64",
    cpus=4,
    memory=8 * 10**9,
    disk=100 * 10**9,
    driver="fake",
    driver_version="1",
    storage="dir",
    kernel="6.1",
    cgroup="v2",
    agent_version="test",
)


def hello(**changes: Any) -> Hello:
    """A HELLO with plausible contents."""
    fields: dict[str, Any] = {
        "oldest": 1,
        "newest": 1,
        "version": "test",
        "boot_id": "boot",
        "machine_id": "machine",
        "instance": "instance",
        "connection": 1,
        "monotonic": 5000.0,
    }
    return Hello(**(fields | changes))


class FakeAgent:
    """One agent. `serve` makes it live by itself; without, a test sends and receives message by message.

    `behaviour` gives the result of a command that is begun; `effects` counts how often each id was really begun.
    """

    def __init__(
        self,
        endpoint: str,
        server_key: str,
        keys: KeyPair | None = None,
        *,
        machine_id: str = "machine",
        heartbeat: float = 0.2,
        behaviour: Callable[[Command], Result] = lambda command: Result(command.id, outcome=Outcome()),
    ) -> None:
        self.keys = keys or generate()
        self.instance = uuid.uuid4().hex
        self.machine_id = machine_id
        self.containers: tuple[ContainerReport, ...] = ()
        self.behaviour = behaviour
        self.journal: dict[str, Result] = {}
        self.effects: Counter[str] = Counter()
        self.commands: list[Command] = []
        self.acknowledged: list[str] = []
        self.confirmed: list[dict[str, int]] = []
        self.refusals: list[Refused] = []
        self.welcome: Welcome | None = None
        self._endpoint = endpoint
        self._server_key = server_key
        self._heartbeat = heartbeat
        self._connections = 0
        self._beats = 0
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._served: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ by hand

    def connect(self, routing_id: bytes | None = None) -> None:
        """Open a new connection; the one before is closed."""
        self.disconnect()
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.curve_publickey = self.keys.public.encode()
        socket.curve_secretkey = self.keys.secret.encode()
        socket.curve_serverkey = self._server_key.encode()
        if routing_id is not None:
            socket.routing_id = routing_id
        socket.connect(self._endpoint)
        self._socket = socket
        self._connections += 1

    def disconnect(self) -> None:
        """Break the connection."""
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    async def send(self, message: AgentMessage) -> None:
        """Send a message on the connection."""
        await self.send_frames(encode(message))

    async def send_frames(self, *frames: bytes) -> None:
        """Send whatever these bytes are."""
        assert self._socket is not None
        await self._socket.send_multipart(frames)

    async def receive(self, timeout: float | None = 5.0) -> ControllerMessage:
        """The next message. Raises TimeoutError; None waits for ever."""
        assert self._socket is not None
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with a message.
        async with asyncio.timeout(timeout):
            frames = await self._socket.recv_multipart()
        assert len(frames) == 1
        return decode_from_controller(frames[0])

    async def expect(self, kind: type[M], timeout: float = 5.0) -> M:
        """The next message of this kind; others are passed over. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while True:
                message = await self.receive(timeout)
                if isinstance(message, kind):
                    return message

    async def say_hello(self, **changes: Any) -> None:
        """Send HELLO for this connection."""
        facts = {"instance": self.instance, "machine_id": self.machine_id, "connection": self._connections}
        await self.send(hello(**({"monotonic": time.monotonic()} | facts | changes)))

    async def join(self) -> Welcome:
        """Connect, be welcomed and have the inventory confirmed."""
        self.connect()
        await self.say_hello()
        self.welcome = await self.expect(Welcome)
        await self.send(self.inventory())
        self.confirmed.append((await self.expect(Confirm)).generations)
        return self.welcome

    def inventory(self) -> Inventory:
        """All that this agent claims to have."""
        return Inventory(FACTS, self.containers, ())

    async def beat(self) -> None:
        """Send a heartbeat."""
        self._beats += 1
        await self.send(Heartbeat(self._beats, time.monotonic(), 0.0))

    # ------------------------------------------------------------ alive

    async def serve(self) -> None:
        """Join and live: heartbeats, commands answered by `behaviour`, until `close` or `stop`."""
        await self.join()
        self._served = asyncio.create_task(self._live())

    async def stop(self) -> None:
        """Die without a word."""
        if self._served is not None:
            self._served.cancel()
            await asyncio.gather(self._served, return_exceptions=True)
            self._served = None
        self.disconnect()

    async def close(self) -> None:
        """Stop and free everything."""
        await self.stop()
        self._context.destroy(linger=0)

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat_always())
            group.create_task(self._answer_always())

    async def _beat_always(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(self._heartbeat)

    async def _answer_always(self) -> None:
        while True:
            await self._answer(await self.receive(timeout=None))

    async def _answer(self, message: ControllerMessage) -> None:
        match message:
            case Command():
                self.commands.append(message)
                if message.id not in self.journal:
                    self.effects[message.id] += 1
                    await self.send(Accepted(message.id))
                    self.journal[message.id] = self.behaviour(message)
                await self.send(self.journal[message.id])
            case ResultAcknowledged():
                self.acknowledged.extend(message.commands)
            case Refused():
                self.refusals.append(message)
            case Confirm():
                self.confirmed.append(message.generations)
            case Welcome() | Ping():
                pass
