"""One connection to the controller: a DEALER behind CURVE, and the word that it has ended."""

from __future__ import annotations

import random
from typing import NoReturn

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from common import codec
from common.keys import KeyPair

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


class Connection:
    """A socket that carries whole messages as bytes; it connects while `watch` runs. Closed once and for all."""

    def __init__(self, context: zmq.asyncio.Context, address: str, keys: KeyPair, controller_key: str) -> None:
        self.address = address
        self._socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
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
            zmq.IPV6: int("[" in address),
            zmq.CURVE_PUBLICKEY: keys.public.encode(),
            zmq.CURVE_SECRETKEY: keys.secret.encode(),
            zmq.CURVE_SERVERKEY: controller_key.encode(),
        }
        for option, value in options.items():
            self._socket.set(option, value)

    async def watch(self) -> NoReturn:
        """Connect, and raise LinkLost when the connection ends: libzmq never retries after a refusal (measured)."""
        monitor = self._socket.get_monitor_socket(_LOST)
        self._socket.connect(self.address)
        event = parse_monitor_message(await monitor.recv_multipart())
        name = zmq.Event(event["event"]).name
        if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise LinkRefused(f"the controller does not know this agent's key ({name} {event['value']})")
        raise LinkLost(f"the connection ended ({name})")

    async def send(self, packed: bytes) -> None:
        """Send a message, waiting while the link is slow."""
        await self._socket.send(packed)

    async def receive(self) -> bytes:
        """The next message. Raises LinkLost when the other side does not speak in single frames."""
        frames: list[bytes] = await self._socket.recv_multipart()
        if len(frames) != 1:
            raise LinkLost(f"the controller sent {len(frames)} frames instead of one")
        return frames[0]

    def close(self) -> None:
        """Drop the connection with all that was not sent yet."""
        self._socket.disable_monitor()
        self._socket.close(linger=0)
