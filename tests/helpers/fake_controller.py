"""A small double of the controller's end of the link: ROUTER, CURVE and ZAP over a real socket.

A test drives it by hand: it reads what agents send with `expect`, and sends what it likes.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

import zmq
import zmq.asyncio
from zmq.utils import z85

from common import codec, keys
from common.commands import AnyArguments
from common.messages import (
    AgentMessage,
    Command,
    ControllerMessage,
    Heartbeat,
    Hello,
    Inventory,
    Ping,
    Samples,
    Welcome,
)

T = TypeVar("T")


class FakeController:
    """Listens on a free port of loopback; `allowed` are the public keys that it lets in."""

    def __init__(self, *allowed: str, port: int = 0, pair: keys.KeyPair | None = None) -> None:
        self.keys = pair or keys.generate()
        self.allowed = set(allowed)
        self.epoch = 1
        self.session = "session-1"
        self.heartbeat_interval = 0.2
        self.heartbeat_timeout = 2.0
        self.sample_interval = 60.0
        self.welcome_at_once = True
        self.ping = True
        self.connection = b""
        self.users: list[str] = []
        self.denied: asyncio.Queue[str] = asyncio.Queue()
        self.received: asyncio.Queue[AgentMessage] = asyncio.Queue()
        self.seen: list[AgentMessage] = []
        self._port = port
        self._context = zmq.asyncio.Context()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> FakeController:
        gate = self._context.socket(zmq.REP)
        gate.linger = 0
        gate.bind("inproc://zeromq.zap.01")
        self.router = self._context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.curve_server = True
        self.router.curve_secretkey = self.keys.secret.encode()
        self.router.zap_domain = b"agents"
        self.router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self.router.set(zmq.ROUTER_MANDATORY, 1)
        self.router.bind(f"tcp://127.0.0.1:{self._port or '*'}")
        self.address = self.router.get(zmq.LAST_ENDPOINT).decode()
        self._port = int(self.address.rsplit(":", 1)[1])
        self._tasks = [
            asyncio.create_task(self._authenticate(gate)),
            asyncio.create_task(self._receive()),
            asyncio.create_task(self._pings()),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop listening; a second time does nothing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    @property
    def port(self) -> int:
        return self._port

    async def send(self, message: ControllerMessage) -> None:
        await self.send_frames(codec.encode(message))

    async def send_frames(self, *frames: bytes) -> None:
        await self.router.send_multipart([self.connection, *frames])

    async def command(self, id: str, arguments: AnyArguments, **changed: object) -> Command:
        """Send a command of the current session; `changed` replaces fields of it."""
        now = next((m.monotonic for m in reversed(self.seen) if isinstance(m, Heartbeat | Hello)), 0.0)
        fields: dict[str, object] = {
            "id": id,
            "epoch": self.epoch,
            "session": self.session,
            "generation": 1,
            "expires_at": now + 60,
            "arguments": arguments,
        }
        command = Command(**{**fields, **changed})  # type: ignore[arg-type]
        await self.send(command)
        return command

    async def expect(self, kind: type[T], within: float = 10.0) -> T:
        """The next message of this kind; what comes before it is passed over."""
        async with asyncio.timeout(within):
            while True:
                message = await self.received.get()
                if isinstance(message, kind):
                    return message

    async def expect_ready(self) -> Inventory:
        """An agent that has said HELLO and told its inventory."""
        await self.expect(Hello)
        return await self.expect(Inventory)

    async def welcome(self, connection: int = 0) -> None:
        await self.send(
            Welcome(
                protocol=1,
                node="node1",
                epoch=self.epoch,
                session=self.session,
                heartbeat_interval=self.heartbeat_interval,
                heartbeat_timeout=self.heartbeat_timeout,
                sample_interval=self.sample_interval,
                connection=connection,
            )
        )

    def kinds(self) -> list[str]:
        """What came, in order, without heartbeats and samples."""
        return [type(m).__name__ for m in self.seen if not isinstance(m, Heartbeat | Samples)]

    async def _authenticate(self, gate: zmq.asyncio.Socket) -> None:
        while True:
            request = await gate.recv_multipart()
            key = z85.encode(request[6]).decode()
            code, user = (b"200", key.encode()) if key in self.allowed else (b"400", b"")
            if code != b"200":
                self.denied.put_nowait(key)
            await gate.send_multipart([b"1.0", request[1], code, b"OK", user, b""])

    async def _receive(self) -> None:
        while True:
            connection, frame = await self.router.recv_multipart(copy=False)
            message = codec.decode_from_agent(frame.bytes)
            self.users.append(frame.get("User-Id"))
            self.connection = connection.bytes
            self.seen.append(message)
            self.received.put_nowait(message)
            if isinstance(message, Hello) and self.welcome_at_once:
                await self.welcome()

    async def _pings(self) -> None:
        sequence = 0
        while True:
            await asyncio.sleep(self.heartbeat_interval)
            sequence += 1
            if self.ping and self.connection:
                try:
                    await self.send(Ping(sequence))
                except zmq.ZMQError:
                    self.connection = b""
