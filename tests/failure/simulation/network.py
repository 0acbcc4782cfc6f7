"""The network between agents and controller: ordered connections with delay, loss, partitions; and its rarer tricks.

Like TCP a connection loses nothing in its middle and keeps the order: what it loses is its end. Beyond that (F7)
messages may come twice or overtake others, and commands of an earlier session may come in a later one.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import msgpack

from agent.connection import LinkLost
from common.errors import Unavailable
from tests.failure.simulation.loop import Process, VirtualLoop
from tests.failure.simulation.meetings import Meetings
from tests.failure.simulation.trace import Trace

Direction = Literal["up", "down"]
"""`up` is from the agent to the controller."""
Receive = Callable[[bytes, str, bytes], None]
RECONNECT = (0.05, 1.0)
LATE = 0.8
"""How probably a command that was lost with its session comes in the next one."""
OVERTAKEN_BY = 1.0
"""Seconds by which a message may come before one that was sent earlier; less than the controller waits for that one."""
NUMBERED = frozenset({"accepted", "progress", "heartbeat", "result", "samples", "state-changed", "inventory"})
"""What an agent says in a session: the controller restores its order."""
LOOSE = NUMBERED | {"command", "ping", "abandon", "result-acknowledged"}
"""Messages that may be overtaken, or come twice. The words with which a session begins may not."""


@dataclass
class Weather:
    """How bad it is now: probabilities for each message, and delays in seconds."""

    delay: tuple[float, float] = (0.0005, 0.004)
    late: float = 0.0
    twice: float = 0.0
    overtaken: float = 0.0
    replayed: float = 0.0
    broken: float = 0.0


class Wire:
    """One connection of an agent; has the methods of `agent.connection.Connection`."""

    def __init__(self, network: Network, host: str, key: str, number: int) -> None:
        self.host = self.address = host
        self.key = key
        self.id = b"\0" + number.to_bytes(4, "big")
        self.server: Server | None = None
        self.closed = False
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.opened = asyncio.Event()
        self.inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self.arrival: dict[Direction, float] = {"up": 0.0, "down": 0.0}
        self._network = network

    async def send(self, payload: bytes) -> None:
        """Give a message to the connection; waits until it stands."""
        await self.opened.wait()
        self._network.send(self, "up", payload)

    async def receive(self) -> bytes:
        """The next message."""
        return await self.inbox.get()

    async def watch(self) -> NoReturn:
        """Raise LinkLost when the connection is lost."""
        raise LinkLost(await asyncio.shield(self.lost))

    def close(self) -> None:
        """The agent closes it."""
        self._network.close(self)

    def lose(self, reason: str) -> None:
        """It breaks, and its agent notices."""
        self.closed = True
        if not self.lost.done():
            self.lost.set_result(reason)


@dataclass
class Server:
    """The controller's end while one controller lives; implements the dispatcher's `Transport`."""

    network: Network
    process: Process
    wires: dict[bytes, Wire] = field(default_factory=dict)
    allowed: set[str] = field(default_factory=set)
    receive: Receive | None = None

    def start(self, receive: Receive) -> None:
        self.receive = receive
        self.network.serve(self)

    def allow(self, key: str) -> None:
        self.allowed.add(key)

    def deny(self, key: str) -> None:
        self.allowed.discard(key)

    def send(self, connection: bytes, payload: bytes) -> bool:
        self.process.check()
        wire = self.wires.get(connection)
        if wire is None or wire.closed:
            return False
        self.network.send(wire, "down", payload)
        return True

    def drain(self, limit: int) -> None:
        """Everything is handed over when it arrives."""

    def close(self) -> None:
        self.network.unserve(self)


class Network:
    """All connections, and which hosts cannot be reached now."""

    def __init__(self, loop: VirtualLoop, seed: int, trace: Trace) -> None:
        self.weather = Weather()
        self.server: Server | None = None
        self.cut: dict[str, frozenset[Direction]] = {}
        """Hosts that are partitioned, with the directions in which nothing passes."""
        self._loop = loop
        self._chance = random.Random(f"{seed}/network")
        self._trace = trace
        self._numbers = 0
        self._wires: dict[Wire, None] = {}
        self._held: dict[str, deque[tuple[Wire, Direction, bytes, str]]] = {}
        self._recorded: dict[str, deque[bytes]] = {}
        self._lost: dict[str, deque[bytes]] = {}
        """Commands that never arrived; in a later session they may (measured: 75 of them after a partition of 15 s)."""
        self.meetings = Meetings(seed)

    # ------------------------------------------------------------ connections

    def connect(self, host: str, key: str) -> Wire:
        """A new connection of a host, which comes to stand as soon as it can."""
        self._numbers += 1
        wire = Wire(self, host, key, self._numbers)
        self._wires[wire] = None
        self._try(wire)
        return wire

    def _try(self, wire: Wire) -> None:
        if wire.closed or wire.opened.is_set():
            return
        server = self.server
        if server is None or wire.host in self.cut:
            self._loop.call_later(self._chance.uniform(*RECONNECT), self._try, wire)
            return
        if wire.key not in server.allowed:
            wire.lose("the controller does not know this key")
            return
        wire.server = server
        server.wires[wire.id] = wire
        self._trace.note("connected", wire.host)
        wire.opened.set()

    def close(self, wire: Wire) -> None:
        """The agent, or its end, closes a connection: what is under way on it is lost."""
        wire.closed = True
        self._wires.pop(wire, None)
        if wire.server is not None:
            wire.server.wires.pop(wire.id, None)

    def serve(self, server: Server) -> None:
        """A controller listens."""
        self.server = server

    def unserve(self, server: Server) -> None:
        """The controller is gone: its agents notice soon."""
        if self.server is server:
            self.server = None
        for wire in list(server.wires.values()):
            self._loop.call_later(self._chance.uniform(0.001, 0.2), wire.lose, "connection reset")
            self.close(wire)

    # ------------------------------------------------------------ messages

    def send(self, wire: Wire, direction: Direction, payload: bytes) -> None:
        """A message sets out."""
        weather, kind = self.weather, _kind(payload)
        if kind == "confirm":
            self._deliver_lost(wire)
        if kind == "command":
            self._recorded.setdefault(wire.host, deque(maxlen=16)).append(payload)
        delay = self._chance.uniform(*weather.delay)
        if weather.late and self._chance.random() < weather.late:
            delay += self._chance.uniform(0.05, 3.0)
        arrival = self._loop.time() + delay
        overtakes = OVERTAKEN_BY if kind in LOOSE and self._happens(weather.overtaken) else 0.0
        arrival = max(arrival, wire.arrival[direction] - overtakes)
        wire.arrival[direction] = max(arrival, wire.arrival[direction])
        self._loop.call_at(arrival, self._arrive, wire, direction, payload, kind)
        if kind in LOOSE and self._happens(weather.twice):
            again = arrival + self._chance.uniform(0.0, 3.0)
            self._loop.call_at(again, self._arrive, wire, direction, payload, kind)
        if direction == "down" and self._happens(weather.replayed) and self._recorded.get(wire.host):
            old = self._chance.choice(list(self._recorded[wire.host]))
            self._trace.note("fault", f"replay to {wire.host}")
            self._loop.call_at(arrival, self._arrive, wire, direction, old, "command")
        if self._happens(weather.broken):
            self._trace.note("fault", f"the connection of {wire.host} breaks")
            self.sever(wire)

    def _deliver_lost(self, wire: Wire) -> None:
        for payload in self._lost.pop(wire.host, ()):
            if self._chance.random() < LATE:
                self._trace.note("fault", f"a lost command comes late to {wire.host}")
                self._loop.call_later(self._chance.uniform(0.0, 12.0), self._arrive, wire, "down", payload, "command")

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._chance.random() < probability

    def _arrive(self, wire: Wire, direction: Direction, payload: bytes, kind: str) -> None:
        if wire.closed or wire.server is None or wire.server.process.dead:
            if kind == "command":
                self._lost.setdefault(wire.host, deque(maxlen=16)).append(payload)
            return
        if direction in self.cut.get(wire.host, ()):
            self._held.setdefault(wire.host, deque()).append((wire, direction, payload, kind))
            return
        if kind not in ("heartbeat", "ping", "samples"):
            self._trace.note("message", f"{wire.host} {direction} {kind} {_about(payload)}")
        if direction == "down":
            wire.inbox.put_nowait(payload)
        elif wire.server.receive is not None:
            wire.server.receive(wire.id, wire.key, payload)

    # ------------------------------------------------------------ faults

    def sever(self, wire: Wire) -> None:
        """A connection breaks: what is under way on it is lost, and each side notices in its own time."""
        self.close(wire)
        self._loop.call_later(self._chance.uniform(0.001, 2.0), wire.lose, "connection reset")

    def sever_host(self, host: str) -> None:
        """All connections of a host break."""
        for wire in [wire for wire in self._wires if wire.host == host]:
            self.sever(wire)

    def partition(self, host: str, directions: frozenset[Direction]) -> None:
        """From now on nothing passes in these directions."""
        self.cut[host] = directions

    def heal(self, host: str) -> None:
        """Everything passes again; what was held up comes at once, or its connection turns out to be broken."""
        self.cut.pop(host, None)
        held = self._held.pop(host, deque())
        if self._chance.random() < 0.3:
            self.sever_host(host)
        # At once and in their order: what set out later is still under way.
        for wire, direction, payload, kind in held:
            self._arrive(wire, direction, payload, kind)

    # ------------------------------------------------------------ what is no message

    def check_reach(self, host: str) -> None:
        """Raise Unavailable when the host cannot reach the controller now."""
        if self.server is None or host in self.cut:
            raise Unavailable("the controller cannot be reached")


def _kind(payload: bytes) -> str:
    """A message's tag; `common.codec` packs it first, as a short string."""
    assert payload[1:6] == b"\xa4type", payload[:20]
    return payload[7 : 7 + (payload[6] & 0x1F)].decode()


def _about(payload: bytes) -> str:
    """What a line of the trace says of a message."""
    plain = msgpack.unpackb(payload)
    error = plain.get("error")
    return " ".join(
        str(part)
        for part in (
            plain.get("id") or plain.get("command") or plain.get("commands") or plain.get("session") or "",
            plain["arguments"]["name"] if "arguments" in plain else "",
            f"{error['code']}: {error['text']}" if error else "",
        )
    ).strip()
