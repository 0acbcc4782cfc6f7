"""Frames from node to node over ZeroMQ, behind CURVE by the nodes' own keys: the receiving end's data port.

It is open only while somebody is expected, and lets in the keys of those alone; every message is taken for its key's,
whatever it says. libzmq gives a message to its reader when it is whole, and bounds each part of it: what an expected
node can fill with one message of endless parts is the only memory that nobody here can bound.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import z85

from agent.channel.direct import SLICE, configure, frame_of, parts_of
from agent.channel.endpoint import Connection, Endpoint
from agent.channel.frames import Frame, Kind, decode_greeting
from agent.channel.window import Violation
from common import zap
from common.errors import Unreachable
from common.keys import KeyPair
from common.tasks import Tasks

log = logging.getLogger(__name__)
BIND_WITHIN = 2.0
"""Seconds in which libzmq gives a port back that was used until now."""
AGAIN = 0.05
"""Seconds until a connection whose queue is full is tried again: libzmq does not say when one of many has room."""

PARTING = 2.0
"""Seconds for which a connection stays when this end has done with it."""


@dataclass(frozen=True)
class _Expected:
    """A transfer that is expected, and who sends it."""

    endpoint: Endpoint
    key: str


@dataclass(frozen=True)
class _Caller:
    """A connection that has greeted."""

    expected: _Expected
    connection: Connection


class Listener:
    """This node's data port."""

    def __init__(self, context: Callable[[], zmq.asyncio.Context], keys: KeyPair, port: int) -> None:
        """`context` gives the one in which all its sockets are."""
        self._make_context = context
        self._keys = keys
        self._port = port
        self._tasks = Tasks("data port")
        self._expected: list[_Expected] = []
        self._callers: dict[bytes, _Caller] = {}
        self._gate: asyncio.Task[Any] | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._binding = asyncio.Lock()
        self._complaints = Complaints()

    @asynccontextmanager
    async def expect(self, endpoint: Endpoint, key: str) -> AsyncIterator[None]:
        """Let the holder of `key` in, to the transfer of this endpoint. Raises Unreachable when the port is taken."""
        expected = _Expected(endpoint, key)
        self._expected.append(expected)
        try:
            async with self._binding:
                if self._socket is None:
                    await self._bind()
            yield
        finally:
            self._expected.remove(expected)
            callers = [(peer, caller) for peer, caller in self._callers.items() if caller.expected is expected]
            if callers:
                self._tasks.start(self._part(callers), "parting")
            else:
                self._rest()

    async def _part(self, callers: list[tuple[bytes, _Caller]]) -> None:
        """Let the other end hang up first: what it has not read when this end does may be lost to it."""
        await asyncio.sleep(PARTING)
        for peer, caller in callers:
            if self._callers.get(peer) is caller:
                self._hang_up(peer)
        self._rest()

    def _rest(self) -> None:
        """Stop to listen when nothing is expected any more."""
        if not self._expected and not self._callers:
            self._unbind()

    async def close(self) -> None:
        """Give everything back; nothing is expected any more."""
        self._unbind()
        await self._tasks.close()
        self._gate = None

    async def _bind(self) -> None:
        context = self._make_context()
        self._open_gate(context)
        end = asyncio.get_running_loop().time() + BIND_WITHIN
        while True:
            socket: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
            configure(socket)
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
            socket.set(zmq.ZAP_DOMAIN, zap.DOMAIN)
            socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
            socket.set(zmq.ROUTER_MANDATORY, 1)
            try:
                socket.bind(f"tcp://*:{self._port}")
            except zmq.ZMQError as error:
                socket.close(linger=0)
                if error.errno == errno.EADDRINUSE and asyncio.get_running_loop().time() < end:
                    await asyncio.sleep(AGAIN)
                    continue
                text = f"this node's data port {self._port} cannot be used ({error.strerror}): see `data_port`"
                raise Unreachable(text, field="data_port") from None
            self._socket = socket
            self._reader = self._tasks.start(self._read(socket), "reader")
            return

    def _unbind(self) -> None:
        if self._socket is None or self._reader is None:
            return
        self._reader.cancel()
        # What is still to be said goes out in the background; an `unbind` would drop it.
        self._socket.close()
        self._socket = self._reader = None
        self._callers.clear()

    # ------------------------------------------------------------ who is let in

    def _open_gate(self, context: zmq.asyncio.Context) -> None:
        """It stands before the port is bound: libzmq asks it about every connection."""
        if self._gate is None:
            gate: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
            gate.linger = 0
            gate.bind(zap.ENDPOINT)
            self._gate = self._tasks.start(self._answer(gate), "gate")

    async def _answer(self, gate: zmq.asyncio.Socket) -> None:
        """Answer who asks for a connection; one question that cannot be answered does not stop the others."""
        try:
            while True:
                sender, empty, *request = await gate.recv_multipart()
                await gate.send_multipart([sender, empty, *zap.answer(request, self._user_of)])
        finally:
            gate.close()

    def _user_of(self, public_key: bytes) -> str | None:
        key: str = z85.encode(public_key).decode("ascii") if len(public_key) == 32 else ""
        if any(expected.key == key for expected in self._expected):
            return key
        self._complaints.tell("a node is not let in: no transfer of it is expected", key=key)
        return None

    # ------------------------------------------------------------ what comes in

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        read = 0
        while True:
            peer, *parts = await socket.recv_multipart(copy=False)
            try:
                self._take(socket, peer.bytes, parts)
            except Violation as error:
                self._complaints.tell("a frame of another node is refused", why=str(error))
            read += 1
            if not read % SLICE:
                await asyncio.sleep(0)

    def _take(self, socket: zmq.asyncio.Socket, peer: bytes, parts: list[zmq.Frame]) -> None:
        key = _user_id(parts)
        caller = self._callers.get(peer)
        if caller is None:
            caller = self._greeted(socket, peer, key, frame_of(parts))
        elif key != caller.expected.key:
            raise Violation("it speaks with another key")
        try:
            frame = frame_of(parts)
        except Violation as error:
            caller.expected.endpoint.abort(f"malformed: {error}")
            raise
        caller.expected.endpoint.take(caller.connection, frame)

    def _greeted(self, socket: zmq.asyncio.Socket, peer: bytes, key: str, frame: Frame) -> _Caller:
        """Somebody new: it must know a transfer that is expected of it."""
        if frame.kind is not Kind.HELLO:
            raise Violation(f"{frame.kind.name} before a greeting")
        proof = decode_greeting(frame.payload).proof
        for expected in self._expected:
            if hmac.compare_digest(proof, expected.endpoint.proof) and expected.key == key:
                break
        else:
            raise Violation("a greeting for a transfer that is not expected of it")
        for other, before in list(self._callers.items()):
            if before.expected is expected:
                self._hang_up(other)
        caller = self._callers[peer] = _Caller(expected, expected.endpoint.attach())
        self._tasks.start(self._send(socket, peer, caller), "sender")
        return caller

    def _hang_up(self, peer: bytes) -> None:
        caller = self._callers.pop(peer)
        caller.expected.endpoint.detach(caller.connection)

    async def _send(self, socket: zmq.asyncio.Socket, peer: bytes, caller: _Caller) -> None:
        while frame := await caller.expected.endpoint.outgoing(caller.connection):
            while not await self._sent(socket, peer, frame):
                if self._callers.get(peer) is not caller:
                    return
                await asyncio.sleep(AGAIN)

    async def _sent(self, socket: zmq.asyncio.Socket, peer: bytes, frame: Frame) -> bool:
        """Queue a frame; False when there is no room."""
        try:
            await socket.send_multipart([peer, *parts_of(frame)], flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError:
            # The connection is gone (EHOSTUNREACH), or the socket; the other end comes again.
            if peer in self._callers:
                self._hang_up(peer)
        return True


class Complaints:
    """Warnings about what others send: at most one a second, whatever they do."""

    def __init__(self) -> None:
        self._next = 0.0
        self._kept_back = 0

    def tell(self, text: str, **facts: str) -> None:
        """Log it, or count it."""
        now = asyncio.get_running_loop().time()
        if now < self._next:
            self._kept_back += 1
            return
        log.warning(text, extra={**facts, "more_before": self._kept_back})
        self._next, self._kept_back = now + 1.0, 0


def _user_id(parts: list[zmq.Frame]) -> str:
    try:
        user = parts[-1].get("User-Id") if parts else ""
    except zmq.ZMQError:
        user = ""
    return user if isinstance(user, str) else ""
