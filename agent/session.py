"""A session with the controller: HELLO, WELCOME, the node's inventory, then commands one way and results the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, NoReturn, Protocol

import msgspec

from agent.connection import Connection, LinkLost, LinkRefused
from agent.outbox import Outbox
from common import VERSION, codec
from common.clock import Clock
from common.errors import InvalidRequest, TooLarge, Unsupported, VzfleetError
from common.messages import (
    Abandon,
    AgentMessage,
    Command,
    Confirm,
    FromAgent,
    Heartbeat,
    Hello,
    Inventory,
    Ping,
    Refused,
    Result,
    ResultAcknowledged,
    Welcome,
)
from common.reports import WireError

log = logging.getLogger(__name__)
HANDSHAKE_TIMEOUT = 5.0
INVENTORY_TIMEOUT = 60.0
INVENTORY_EVERY = 300.0
_SHORT_INTERVAL, _LONG_TIMEOUT = 0.05, 3600.0


class LinkHandler(Protocol):
    """What the link brings the controller's words to. All calls come on the event loop."""

    async def welcomed(self, welcome: Welcome) -> None:
        """A session begins; what is sent from now on follows the inventory."""
        ...

    async def inventory(self) -> Inventory:
        """All that the node has, now."""
        ...

    def lost(self) -> None:
        """The session is over."""
        ...

    def command(self, command: Command) -> None:
        """An order came."""
        ...

    def acknowledged(self, commands: tuple[str, ...]) -> None:
        """The controller has committed these results."""
        ...

    def abandoned(self, command: str) -> None:
        """A command is to be given up."""
        ...

    def confirmed(self, generations: dict[str, int]) -> None:
        """The controller's word which containers belong to this node."""
        ...


class Session:
    """What is said over one connection, until LinkLost. What waits in the outbox is delivered after the inventory."""

    def __init__(self, connection: Connection, outbox: Outbox, handler: LinkHandler, clock: Clock) -> None:
        self._connection = connection
        self._outbox = outbox
        self._handler = handler
        self._clock = clock
        self.commit = 0
        """The highest number of a commit that the controller told."""
        self._session = ""
        self._said = 0

    async def open(self, hello: Hello) -> Welcome:
        """Introduce the agent and be let in. Raises LinkLost or LinkRefused."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                await self._connection.send(codec.encode(hello))
                while True:
                    message = await self._read()
                    if isinstance(message, Welcome) and message.connection in (0, hello.connection):
                        self._session = message.session
                        return message
        except TimeoutError:
            raise LinkLost(f"no welcome from {self._connection.address} within {HANDSHAKE_TIMEOUT:g} s") from None

    async def run(self, welcome: Welcome) -> NoReturn:
        """Go on as the welcome says. Raises LinkLost at its end."""
        await first_failure(
            self._receive(_within(welcome.heartbeat_timeout)),
            self._deliver(),
            self._beat(_within(welcome.heartbeat_interval)),
            self._take_stock(welcome),
        )

    # ------------------------------------------------------------ what comes in

    async def _read(self) -> object:
        """The next message; None when it is one that this version does not understand."""
        packed = await self._connection.receive()
        try:
            message = codec.decode_from_controller(packed)
        except (InvalidRequest, TooLarge) as error:
            unknown = codec.unknown_command_id(packed)
            log.warning("a message is not understood", extra={"error": error.text, "command": unknown or ""})
            if unknown is not None:
                refusal = Unsupported(f"agent {VERSION} does not know this command: {error.text}")
                self._outbox.put(Result(unknown, error=WireError(refusal.code, refusal.text[:1000])))
            return None
        if isinstance(message, Refused):
            kind = LinkLost if message.code == "stale" else LinkRefused
            raise kind(f"the controller refused ({message.code}): {message.text}")
        return message

    async def _receive(self, patience: float) -> NoReturn:
        while True:
            try:
                async with asyncio.timeout(patience):
                    message = await self._read()
            except TimeoutError:
                raise LinkLost(f"the controller has been silent for {patience:g} s") from None
            match message:
                case Command():
                    self._handler.command(message)
                case ResultAcknowledged():
                    self._handler.acknowledged(message.commands)
                case Abandon():
                    self._handler.abandoned(message.command)
                case Confirm():
                    self._handler.confirmed(message.generations)
                case Ping():
                    self.commit = max(self.commit, message.commit)
                case Welcome() | None:
                    pass

    # ------------------------------------------------------------ what goes out

    async def _deliver(self) -> NoReturn:
        while True:
            for message in await self._outbox.take():
                await self._send(message)

    async def _send(self, message: AgentMessage) -> None:
        if isinstance(message, FromAgent):
            message = msgspec.structs.replace(message, session=self._session, number=self._said + 1)
        try:
            packed = codec.encode(message)
        except TooLarge as error:
            if isinstance(message, Inventory):
                raise LinkLost(f"the inventory cannot be told: {error.text}") from None
            log.error("a message is dropped", extra={"error": error.text, "kind": type(message).__name__})
            return
        # From here to the socket's queue nothing waits for anything: the numbers leave in their order.
        self._said += 1
        await self._connection.send(packed)

    async def _beat(self, interval: float) -> NoReturn:
        loop = asyncio.get_running_loop()
        lag, sequence = 0.0, 0
        while True:
            await self._send(Heartbeat(sequence, self._clock.monotonic(), lag))
            sequence += 1
            due = loop.time() + interval
            await asyncio.sleep(interval)
            lag = max(0.0, loop.time() - due)

    async def _take_stock(self, welcome: Welcome) -> NoReturn:
        """Tell all that the node has, at once and then every few minutes."""
        await self._handler.welcomed(welcome)
        while True:
            self._outbox.hold()
            try:
                async with asyncio.timeout(INVENTORY_TIMEOUT):
                    inventory = await self._handler.inventory()
            except TimeoutError:
                raise LinkLost(f"the inventory took more than {INVENTORY_TIMEOUT:g} s") from None
            except (VzfleetError, OSError) as error:
                raise LinkLost(f"the inventory cannot be taken: {error}") from None
            self._outbox.release(inventory)
            await asyncio.sleep(INVENTORY_EVERY)


def _within(seconds: float) -> float:
    """An interval which the controller names, within reason; a NaN becomes the shortest."""
    return max(_SHORT_INTERVAL, min(_LONG_TIMEOUT, seconds))


async def first_failure(*works: Coroutine[Any, Any, NoReturn]) -> NoReturn:
    """Run all until one fails, end the others and raise that failure itself, not a group."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        raise done.pop().exception() or LinkLost("the session was given up")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
