"""Frames from node to node over ZeroMQ, behind CURVE by the nodes' own keys: the sending end, which connects.

A connection that ends is made anew by a new socket, as libzmq never tries again after a refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from agent.channel.endpoint import Connection, Endpoint
from agent.channel.frames import Frame, decode
from agent.channel.window import FRAME, Violation
from common.errors import InvalidRequest, Unreachable
from common.keys import KeyPair

log = logging.getLogger(__name__)
REACH_WITHIN = 5.0
"""Seconds in which the receiving node must be reached."""
EXPECT_WITHIN = 60.0
"""Seconds for a node that is reached to expect this transfer: its command may be on its way."""
LINGER = 1000
SLICE = 16
"""Messages that are read without a pause: others have their turn, too."""
_PARTS = 2
_COMMON: dict[zmq.SocketOption, int] = {
    zmq.IPV6: 1,
    zmq.MAXMSGSIZE: FRAME + 64,  # CURVE adds 33 bytes
    zmq.HANDSHAKE_IVL: 3000,
    zmq.HEARTBEAT_IVL: 5000,
    zmq.HEARTBEAT_TIMEOUT: 15000,
    zmq.HEARTBEAT_TTL: 15000,
    zmq.SNDHWM: 8,
    zmq.RCVHWM: 8,
    zmq.LINGER: LINGER,
}
_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Dialler:
    """Keeps an endpoint connected with the node that listens at `address` and holds `peer_key`."""

    def __init__(
        self, context: zmq.asyncio.Context, keys: KeyPair, endpoint: Endpoint, address: str, peer_key: str
    ) -> None:
        self._context = context
        self._keys = keys
        self._endpoint = endpoint
        self._address = address
        self._peer_key = peer_key
        self._refused = False

    async def run(self) -> None:
        """Connect, again and again, until cancelled; fails the endpoint when the node cannot be reached at first."""
        opening = asyncio.ensure_future(self._watch_opening())
        try:
            while self._endpoint.failure is None:
                await self._connect()
                # At first the other node's command is just about to come.
                pause = 0.3 if self._endpoint.greeted else 0.1
                await asyncio.sleep(random.uniform(0.5, 1.0) * pause)  # noqa: S311 jitter
        finally:
            opening.cancel()

    async def _watch_opening(self) -> None:
        """Fail the endpoint if no greeting was answered in time."""
        begun = asyncio.get_running_loop().time()
        while not self._endpoint.greeted and self._endpoint.failure is None:
            waited = asyncio.get_running_loop().time() - begun
            if waited >= (EXPECT_WITHIN if self._refused else REACH_WITHIN):
                self._endpoint.fail(Unreachable(self._why()))
                return
            await self._endpoint.until_greeted(REACH_WITHIN)

    def _why(self) -> str:
        peer = self._endpoint.peer
        if self._refused:
            return f"{peer} at {self._address} lets this node in for no transfer"
        return (
            f"{peer} cannot be reached at {self._address} within {REACH_WITHIN:g} s: "
            "its data port must be open to the other nodes"
        )

    async def _connect(self) -> None:
        """One connection, until it ends."""
        socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        configure(socket)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.RECONNECT_IVL, -1)
        socket.set(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        socket.set(zmq.CURVE_SERVERKEY, self._peer_key.encode())
        monitor = socket.get_monitor_socket(_LOST | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            socket.connect(self._address)
            if await self._shaken_hands(monitor):
                await self._use(socket, monitor)
        except zmq.Again:
            return  # it went away while it was used
        except zmq.ZMQError as error:
            text = f"{self._address} cannot be connected to: {error.strerror}"
            self._endpoint.fail(InvalidRequest(text, field="address"))
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close()

    async def _shaken_hands(self, monitor: zmq.asyncio.Socket) -> bool:
        try:
            async with asyncio.timeout(REACH_WITHIN):
                event = parse_monitor_message(await monitor.recv_multipart())["event"]
        except TimeoutError:
            return False
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refused = True
        return bool(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    async def _use(self, socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        connection = self._endpoint.attach()
        try:
            await first_of(self._send(socket, connection), self._receive(socket, connection), monitor.recv_multipart())
            await self._take_rest(socket, connection)
        finally:
            self._endpoint.detach(connection)

    async def _take_rest(self, socket: zmq.asyncio.Socket, connection: Connection) -> None:
        """What came before the connection was lost: the other end may have said its last word and hung up."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._take(connection, await socket.recv_multipart(flags=zmq.NOBLOCK, copy=False))

    async def _send(self, socket: zmq.asyncio.Socket, connection: Connection) -> None:
        while frame := await self._endpoint.outgoing(connection):
            await socket.send_multipart(parts_of(frame), copy=False)

    async def _receive(self, socket: zmq.asyncio.Socket, connection: Connection) -> None:
        read = 0
        while True:
            self._take(connection, await socket.recv_multipart(copy=False))
            read += 1
            if not read % SLICE:
                await asyncio.sleep(0)

    def _take(self, connection: Connection, parts: list[zmq.Frame]) -> None:
        try:
            self._endpoint.take(connection, frame_of(parts))
        except Violation as error:
            log.warning("a node does not keep to the protocol", extra={"peer": self._endpoint.peer, "why": str(error)})
            self._endpoint.abort(f"malformed: {error}")


def configure(socket: zmq.asyncio.Socket) -> None:
    """Set what both ends have in common."""
    for option, value in _COMMON.items():
        socket.set(option, value)


async def first_of(*works: Awaitable[Any]) -> None:
    """Run them until the first ends, and end the others. Raises what it raised."""
    running = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            one.result()
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def parts_of(frame: Frame) -> list[bytes]:
    """A frame as the parts of a message."""
    return [frame.header, frame.payload] if frame.payload else [frame.header]


def frame_of(parts: list[zmq.Frame]) -> Frame:
    """The parts of a message as a frame. Raises Violation."""
    if not 1 <= len(parts) <= _PARTS:
        raise Violation(f"a message of {len(parts)} parts")
    return decode(parts[0].bytes, parts[1].bytes if len(parts) == _PARTS else b"")
