"""/1.0/events: what happens, as it happens, over a websocket."""

from __future__ import annotations

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketHandler

from common.errors import Forbidden, InvalidRequest, Unavailable, VzfleetError
from common.names import check_container_id
from controller.api.base import Handler
from controller.api.frames import Frames
from controller.api.identity import Right, authenticate, authorize
from controller.records import EventType
from controller.subscriptions import TRY_AGAIN_LATER, Subscription, Wants

PING_EVERY = 10.0
"""Seconds, as LXD; who has not answered by the next one is closed."""
MAX_MESSAGE = 4096
MAX_METRICS = 10_000
SEND_BUFFER = 128 * 1024
"""Bytes that the kernel keeps for a client which does not take them."""
METRIC = "metric"
TYPES = ("operation", "lifecycle", METRIC, "logging")
"""LXD's `logging` is understood, and there are never any."""
POLICY_VIOLATION, INTERNAL_ERROR = 1008, 1011
"""Close codes of websockets (RFC 6455, 7.4.1)."""


class Events(Handler, WebSocketHandler):
    """GET: a websocket of LXD's event objects, with numbers from which a client goes on where it was (`since`)."""

    rights = {"GET": Right.READ}
    parameters = ("type", "since", "container", "metrics", "all-projects")
    ping_interval = PING_EVERY
    ping_timeout = PING_EVERY
    max_message_size = MAX_MESSAGE
    _subscription: Subscription | None = None
    _sender: asyncio.Task[None] | None = None
    _check: asyncio.Task[None] | None = None

    async def get(self, *args: Any, **kwargs: Any) -> None:
        headers = self.request.headers
        hops = [hop.strip().lower() for hop in headers.get("Connection", "").split(",")]
        if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in hops:
            raise InvalidRequest("this is a websocket", field="Upgrade", allowed="websocket")
        origin = headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("Host"):
            raise Forbidden("another site's pages may not listen", field="Origin")
        self._wants = self._read_wants()
        latest = self.services.events.latest
        self._since = self.whole_parameter("since", latest, 0)
        self.services.events.require_room()
        self.set_header("X-Sequence", str(latest))
        await super().get(*args, **kwargs)

    def _read_wants(self) -> Wants:
        container = self.get_query_argument("container", "")
        wanted = self._names("type")
        for name in wanted:
            if name not in TYPES:
                raise InvalidRequest(f"unknown type {name[:40]!r}", field="type", allowed=", ".join(TYPES))
        types = [type for type in EventType if not wanted or type in wanted]
        return Wants(types, check_container_id(container, "container") if container else None, self._metrics(wanted))

    def _metrics(self, types: list[str]) -> frozenset[str] | None:
        """The containers whose figures are asked for; None for all."""
        names = self._names("metrics")
        container = self.get_query_argument("container", "")
        if names == ["*"] or (METRIC in types and not names):
            return frozenset((container,)) if container else None
        if len(names) > MAX_METRICS:
            raise InvalidRequest("too many containers", field="metrics", allowed=f"at most {MAX_METRICS}, or *")
        return frozenset(check_container_id(name, "metrics") for name in names)

    def _names(self, parameter: str) -> list[str]:
        return [name for name in self.get_query_argument(parameter, "").split(",") if name]

    # ------------------------------------------------------------ the connection

    def open(self, *_args: str, **_kwargs: str) -> None:
        self.set_nodelay(True)
        connection: Any = self.ws_connection
        connection.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        frames = Frames(self.services.fleet, self.services.operations)
        events = self.services.events
        self._subscription = events.subscribe(self._wants, self._since, frames, self.close)
        self._subscription.sampled(self.services.fleet.containers.keys())
        self._sender = events.tasks.start(self._send(self._subscription), self.request_id)

    async def _send(self, subscription: Subscription) -> None:
        """Send what there is until the client is gone."""
        connection: Any = self.ws_connection
        try:
            while not connection.is_closing():
                chunk = await subscription.next()
                if connection.is_closing():
                    return
                subscription.sending = True
                await connection.stream.write(chunk)
                subscription.sending = False
                await asyncio.sleep(0)  # a write that ends at once lets nobody else have the loop
        except StreamClosedError:
            return
        except Unavailable as error:
            self.close(TRY_AGAIN_LATER, f"{error.text[:60]}; resume with since={subscription.position}")
        finally:
            self.close(INTERNAL_ERROR, f"resume with since={subscription.position}")  # unless it is closed already

    def on_message(self, message: str | bytes) -> None:
        """Nothing that a client says is asked for."""

    def on_pong(self, _data: bytes) -> None:
        """Look whether its token is still good, as often as it says that it is there."""
        if self._check is None or self._check.done():  # a client may send as many as it likes
            self._check = self.services.events.tasks.start(self._check_token(), self.request_id)

    async def _check_token(self) -> None:
        try:
            authorize(await authenticate(self.request, self.services.identities, self.request_id), Right.READ)
        except VzfleetError as error:
            self.close(POLICY_VIOLATION, error.text[:100])

    def on_close(self) -> None:
        if self._subscription is not None:
            self._subscription.leave()
        if self._sender is not None:
            self._sender.cancel()


routes = [(r"/1\.0/events", Events)]
