"""The controller's end of the link: one ROUTER socket behind CURVE. The only file of the controller that imports zmq.

A sender is who its CURVE key says, read from each message's `User-Id`; what it calls itself proves nothing.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import cast

import zmq
from zmq.utils import z85

from common import zap
from common.clock import Clock
from common.codec import MAX_MESSAGE
from common.errors import InvalidRequest
from common.keys import KeyPair
from controller.dispatch.drops import Drops
from controller.dispatch.listener import Receive

_SLICE = 256
_OPTIONS: dict[int, int | bytes] = {
    zmq.CURVE_SERVER: 1,
    zmq.ZAP_DOMAIN: zap.DOMAIN,
    zmq.ZAP_ENFORCE_DOMAIN: 1,  # without it a server that lost its ZAP handler lets everybody in
    zmq.ROUTER_MANDATORY: 1,
    zmq.ROUTER_HANDOVER: 0,
    zmq.MAXMSGSIZE: MAX_MESSAGE,
    zmq.HANDSHAKE_IVL: 3000,
    zmq.BACKLOG: 4096,
    zmq.HEARTBEAT_IVL: 2000,
    zmq.HEARTBEAT_TIMEOUT: 6000,
    zmq.HEARTBEAT_TTL: 6000,
    zmq.SNDHWM: 1000,
    zmq.RCVHWM: 100,
    zmq.LINGER: 0,
}


class Router:
    """A ROUTER socket on `endpoint` (`tcp://ADDRESS:PORT`; port `*` takes a free one). Implements `Transport`."""

    def __init__(self, endpoint: str, keys: KeyPair, clock: Clock) -> None:
        self.drops = Drops(clock)
        self._endpoint = endpoint
        self._keys = keys
        self._allowed: set[str] = set()
        self._receive: Receive | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._agents: _Reader | None = None
        self._zap: _Reader | None = None

    def start(self, receive: Receive) -> None:
        """Bind and listen on the running event loop. Raises OSError when the address cannot be bound."""
        self._receive = receive
        self._context = zmq.Context()
        gate = self._context.socket(zmq.ROUTER)
        self._zap = _Reader(gate, self._answer_zap, self.drops)
        socket = self._context.socket(zmq.ROUTER)
        self._agents = _Reader(socket, self._take, self.drops)
        try:
            gate.linger = 0
            gate.bind(zap.ENDPOINT)
            for option, value in _OPTIONS.items():
                socket.set(option, value)
            socket.set(zmq.IPV6, int("[" in self._endpoint))
            socket.set(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
            socket.bind(self._endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, error.strerror, self._endpoint) from None
        self._zap.start()
        self._agents.start()

    @property
    def port(self) -> int:
        """The TCP port on which it listens."""
        if self._agents is None:
            raise RuntimeError("the router is not started")
        endpoint = cast(bytes, self._agents.socket.get(zmq.LAST_ENDPOINT))
        return int(endpoint.decode().rsplit(":", 1)[1])

    def allow(self, key: str) -> None:
        """Let in the holder of this public key. Raises InvalidRequest when it is not a key in Z85."""
        try:
            raw = z85.decode(key)
        except (ValueError, KeyError, struct.error):
            raw = b""
        if len(raw) != 32:
            raise InvalidRequest("not a CURVE public key", field="key", allowed="40 characters of Z85")
        self._allowed.add(key)

    def deny(self, key: str) -> None:
        """Shut out the holder of this key; its standing connection is no longer heard."""
        self._allowed.discard(key)

    def send(self, connection: bytes, payload: bytes) -> bool:
        """Queue a message without waiting; False when the connection is gone or its queue is full."""
        if self._agents is None:
            return False
        try:
            self._agents.socket.send_multipart((connection, payload), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.drops.count("send refused", error=str(error))
            return False
        finally:
            self._agents.check()
        return True

    def drain(self, limit: int) -> None:
        """Hand over what has arrived by now, at most `limit` messages."""
        if self._agents is not None:
            self._agents.read(limit)

    def close(self) -> None:
        """Close the sockets; what is still queued is lost, as on any broken connection."""
        for reader in (self._agents, self._zap):
            if reader is not None:
                reader.close()
        self._agents = self._zap = None
        if self._context is not None:
            self._context.term()
            self._context = None

    def _take(self, socket: zmq.Socket[bytes]) -> None:
        connection = socket.recv(zmq.NOBLOCK)
        frame: zmq.Frame = socket.recv(zmq.NOBLOCK, copy=False)
        surplus = 0
        while socket.rcvmore:
            socket.recv(zmq.NOBLOCK, copy=False)
            surplus += 1
        try:
            key = frame.get("User-Id")
        except zmq.ZMQError:
            key = None
        if not isinstance(key, str) or key not in self._allowed:
            return self.drops.count("unknown key")
        # Agents choose no routing id; libzmq's own begin with a zero byte, which no peer can claim.
        if surplus or len(connection) != 5 or connection[0] != 0:
            return self.drops.count("not two frames from an unnamed peer", frames=surplus + 2, key=key)
        if self._receive is not None:
            self._receive(connection, key, frame.bytes)
        return None

    def _answer_zap(self, socket: zmq.Socket[bytes]) -> None:
        sender, empty, *request = socket.recv_multipart(zmq.NOBLOCK)
        socket.send_multipart([sender, empty, *zap.answer(request, self._user_of)])

    def _user_of(self, public_key: bytes) -> str | None:
        key: str = z85.encode(public_key).decode("ascii") if len(public_key) == 32 else ""
        if key in self._allowed:
            return key
        self.drops.count("handshake with an unknown key", key=key)
        return None


class _Reader:
    """Reads a socket as its descriptor says. That is edge-triggered: after each use the socket must be asked again."""

    def __init__(self, socket: zmq.Socket[bytes], take: Callable[[zmq.Socket[bytes]], None], drops: Drops) -> None:
        self.socket = socket
        self._take = take
        self._drops = drops
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.socket.fileno(), self._slice)
        self.check()

    def check(self) -> None:
        """Have the rest read soon, if there is any."""
        if self._loop is None or self._scheduled:
            return
        if cast(int, self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._scheduled = True
            self._loop.call_soon(self._slice)

    def read(self, limit: int) -> None:
        """Take up to `limit` messages; a message that fails is counted and does not stop the others."""
        for _ in range(limit):
            if self.socket.closed:
                return
            try:
                self._take(self.socket)
            except zmq.Again:
                return
            except Exception as error:
                self._drops.count("failed", failure=error)

    def _slice(self) -> None:
        self._scheduled = False
        if not self.socket.closed:
            self.read(_SLICE)
        if not self.socket.closed:
            self.check()

    def close(self) -> None:
        if self._loop is not None and not self.socket.closed:
            self._loop.remove_reader(self.socket.fileno())
        self.socket.close()
