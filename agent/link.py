"""The agent's end of the link: one DEALER behind CURVE, opened anew whenever the controller falls silent.

A session is: HELLO, WELCOME, the node's inventory, and from then on commands one way and results the other.
What a broken session did not deliver is told anew by the next one: results from the journal, states by the inventory.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from agent.identity import Identity
from common import codec
from common.clock import Clock
from common.errors import InvalidRequest, TooLarge, Unsupported, VzfleetError
from common.keys import KeyPair
from common.messages import (
    OLDEST_PROTOCOL,
    PROTOCOL,
    Abandon,
    AgentMessage,
    Command,
    Confirm,
    Heartbeat,
    Hello,
    Inventory,
    Ping,
    Refused,
    Result,
    ResultAcknowledged,
    Samples,
    Welcome,
)
from common.reports import WireError

log = logging.getLogger(__name__)
HANDSHAKE_TIMEOUT = 5.0
INVENTORY_TIMEOUT = 60.0
INVENTORY_EVERY = 300.0
KEPT_TICKS = 3
"""Ticks of samples that wait for a slow link; older ones are dropped."""
_SHORT_INTERVAL, _LONG_TIMEOUT = 0.05, 3600.0
_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class LinkLost(Exception):
    """The session is over; the text says why."""


class LinkRefused(LinkLost):
    """The controller will not have this agent for now."""


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


@dataclass(frozen=True)
class Backoff:
    """Seconds before the next try: they double from `first` to `longest`, each time with jitter."""

    first: float = 0.1
    longest: float = 10.0

    def delay(self, failures: int) -> float:
        """Before the try after this many failures in a row, at least one."""
        ceiling = min(self.longest, self.first * 2.0 ** min(failures, 30))
        return random.uniform(0.5, 1.0) * ceiling  # noqa: S311 jitter


class Link:
    """Keeps a session with the controller. `connected` is set while there is one whose inventory is on its way."""

    def __init__(
        self,
        address: str,
        keys: KeyPair,
        controller_key: str,
        identity: Identity,
        clock: Clock,
        handler: LinkHandler,
        backoff: Backoff | None = None,
    ) -> None:
        self.connected = asyncio.Event()
        self._address = address
        self._keys = keys
        self._controller_key = controller_key
        self._identity = identity
        self._clock = clock
        self._handler = handler
        self._backoff = backoff or Backoff()
        self._connections = 0
        self._replies: deque[AgentMessage] = deque()
        self._ticks: deque[Sequence[Samples]] = deque(maxlen=KEPT_TICKS)
        self._held = False
        self._waiting = asyncio.Event()

    def send(self, message: AgentMessage) -> None:
        """Have a message delivered in order in this session; without a session it is dropped."""
        if self.connected.is_set():
            self._replies.append(message)
            self._waiting.set()

    def offer(self, samples: Sequence[Samples]) -> None:
        """Have a tick's figures delivered, unless newer ones push them out."""
        if self.connected.is_set():
            self._ticks.append(samples)
            self._waiting.set()

    async def run(self) -> NoReturn:
        """Keep a session until cancelled."""
        context = zmq.asyncio.Context()
        failures = 0
        try:
            while True:
                began = self._clock.monotonic()
                try:
                    await self._session(context)
                except LinkLost as reason:
                    was_connected = self.connected.is_set()
                    failures = 1 if was_connected else failures + 1
                    # A refusal is not cured by haste.
                    tries = failures + 5 if isinstance(reason, LinkRefused) else failures
                    delay = self._backoff.delay(tries)
                    lasted = round(self._clock.monotonic() - began, 1)
                    log.warning("no link", extra={"reason": str(reason), "lasted": lasted, "retry_in": round(delay, 2)})
                finally:
                    self._reset()
                await asyncio.sleep(delay)
        finally:
            context.destroy(linger=0)

    def _reset(self) -> None:
        if self.connected.is_set():
            self.connected.clear()
            self._handler.lost()
        self._replies.clear()
        self._ticks.clear()
        self._held = False

    async def _session(self, context: zmq.asyncio.Context) -> NoReturn:
        """One connection from HELLO to its end, which raises LinkLost."""
        socket = self._open_socket(context)
        try:
            await _first_failure(self._watch(socket), self._converse(socket))
        finally:
            socket.disable_monitor()
            socket.close(linger=0)

    async def _converse(self, socket: zmq.asyncio.Socket) -> NoReturn:
        welcome = await self._handshake(socket)
        log.info("welcomed", extra={"node": welcome.node, "epoch": welcome.epoch, "session": welcome.session})
        self._held = True
        self.connected.set()
        await _first_failure(
            self._receive(socket, _within(welcome.heartbeat_timeout)),
            self._deliver(socket),
            self._beat(socket, _within(welcome.heartbeat_interval)),
            self._take_stock(welcome),
        )

    def _open_socket(self, context: zmq.asyncio.Context) -> zmq.asyncio.Socket:
        socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
        options: dict[zmq.SocketOption, int | bytes] = {
            zmq.LINGER: 0,
            zmq.IMMEDIATE: 1,  # nothing is queued for a connection that does not stand
            zmq.MAXMSGSIZE: codec.MAX_MESSAGE,
            zmq.HANDSHAKE_IVL: 3000,
            zmq.HEARTBEAT_IVL: 2000,
            zmq.HEARTBEAT_TIMEOUT: 6000,
            zmq.HEARTBEAT_TTL: 6000,
            zmq.SNDHWM: 100,
            zmq.RCVHWM: 1000,
            zmq.RECONNECT_IVL: random.randint(100, 300),  # noqa: S311 jitter
            zmq.RECONNECT_IVL_MAX: 2000,
            zmq.IPV6: int("[" in self._address),
            zmq.CURVE_PUBLICKEY: self._keys.public.encode(),
            zmq.CURVE_SECRETKEY: self._keys.secret.encode(),
            zmq.CURVE_SERVERKEY: self._controller_key.encode(),
        }
        for option, value in options.items():
            socket.set(option, value)
        return socket

    async def _watch(self, socket: zmq.asyncio.Socket) -> NoReturn:
        """End the session when the connection ends: libzmq never retries after a refusal (measured)."""
        monitor = socket.get_monitor_socket(_LOST)
        socket.connect(self._address)
        event = parse_monitor_message(await monitor.recv_multipart())
        name = zmq.Event(event["event"]).name
        if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise LinkRefused(f"the controller does not know this agent's key ({name} {event['value']})")
        raise LinkLost(f"the connection ended ({name})")

    async def _handshake(self, socket: zmq.asyncio.Socket) -> Welcome:
        self._connections += 1
        hello = Hello(
            oldest=OLDEST_PROTOCOL,
            newest=PROTOCOL,
            version=self._identity.version,
            boot_id=self._identity.boot_id,
            machine_id=self._identity.machine_id,
            instance=self._identity.instance,
            connection=self._connections,
            monotonic=self._clock.monotonic(),
        )
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                await socket.send(codec.encode(hello))
                while True:
                    message = await self._read(socket)
                    if isinstance(message, Welcome):
                        return message
        except TimeoutError:
            raise LinkLost(f"no welcome from {self._address} within {HANDSHAKE_TIMEOUT:g} s") from None

    async def _read(self, socket: zmq.asyncio.Socket) -> object:
        """The next message; None when it is one that this version does not understand."""
        frames: list[bytes] = await socket.recv_multipart()
        if len(frames) != 1:
            raise LinkLost(f"the controller sent {len(frames)} frames instead of one")
        try:
            message = codec.decode_from_controller(frames[0])
        except (InvalidRequest, TooLarge) as error:
            unknown = codec.unknown_command_id(frames[0])
            log.warning("a message is not understood", extra={"error": error.text, "command": unknown or ""})
            if unknown is not None:
                refusal = Unsupported(f"agent {self._identity.version} does not know this command: {error.text}")
                self.send(Result(unknown, error=WireError(refusal.code, refusal.text[:1000])))
            return None
        if isinstance(message, Refused):
            kind = LinkLost if message.code == "stale" else LinkRefused
            raise kind(f"the controller refused ({message.code}): {message.text}")
        return message

    async def _receive(self, socket: zmq.asyncio.Socket, patience: float) -> NoReturn:
        while True:
            try:
                async with asyncio.timeout(patience):
                    message = await self._read(socket)
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
                case Ping() | Welcome() | None:
                    pass

    async def _deliver(self, socket: zmq.asyncio.Socket) -> NoReturn:
        """Send what waits: replies first and in order, then samples; nothing while the inventory is being taken."""
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while not self._held and (self._replies or self._ticks):
                if self._replies:
                    await self._put(socket, self._replies.popleft())
                    continue
                for samples in self._ticks.popleft():
                    await self._put(socket, samples)

    async def _put(self, socket: zmq.asyncio.Socket, message: AgentMessage) -> None:
        try:
            packed = codec.encode(message)
        except TooLarge as error:
            if isinstance(message, Inventory):
                raise LinkLost(f"the inventory cannot be told: {error.text}") from None
            log.error("a message is dropped", extra={"error": error.text, "kind": type(message).__name__})
            return
        await socket.send(packed)

    async def _beat(self, socket: zmq.asyncio.Socket, interval: float) -> NoReturn:
        loop = asyncio.get_running_loop()
        lag, sequence = 0.0, 0
        while True:
            await socket.send(codec.encode(Heartbeat(sequence, self._clock.monotonic(), lag)))
            sequence += 1
            due = loop.time() + interval
            await asyncio.sleep(interval)
            lag = max(0.0, loop.time() - due)

    async def _take_stock(self, welcome: Welcome) -> NoReturn:
        """Tell all that the node has, at once and then every few minutes.

        Replies wait meanwhile: one that was older than the inventory, but came after it, would be believed.
        """
        await self._handler.welcomed(welcome)
        while True:
            self._held = True
            try:
                async with asyncio.timeout(INVENTORY_TIMEOUT):
                    inventory = await self._handler.inventory()
            except TimeoutError:
                raise LinkLost(f"the inventory took more than {INVENTORY_TIMEOUT:g} s") from None
            except VzfleetError as error:
                raise LinkLost(f"the inventory cannot be taken: {error.text}") from None
            self._replies.appendleft(inventory)
            self._held = False
            self._waiting.set()
            await asyncio.sleep(INVENTORY_EVERY)


def _within(seconds: float) -> float:
    """An interval which the controller names, within reason; a NaN becomes the shortest."""
    return max(_SHORT_INTERVAL, min(_LONG_TIMEOUT, seconds))


async def _first_failure(*works: Coroutine[Any, Any, NoReturn]) -> NoReturn:
    """Run all until one fails, end the others and raise that failure itself, not a group."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        raise done.pop().exception() or LinkLost("the session was given up")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
