"""Frames by way of the controller's relay, over HTTPS: what this end sends is a PUT, what it gets a GET.

The relay carries bytes both ways and knows nothing of frames. When it or one of the connections breaks, both are made
anew with the same tokens.
"""

from __future__ import annotations

import asyncio
import logging
import random

from agent.channel.direct import first_of
from agent.channel.endpoint import Connection, Endpoint
from agent.channel.frames import HEADER, decode, payload_size
from agent.channel.window import FRAME, Violation
from agent.https import TRANSPORT_ERRORS, HttpsClient, Request
from common.commands import Route
from common.errors import VzfleetError

log = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds for which the relay may be silent: each end says something every few seconds."""
READ = HEADER + FRAME
LAST = 3.0
"""Seconds in which the relay takes the last bytes."""


class RelayCarrier:
    """Keeps an endpoint connected with the other node through the controller."""

    def __init__(self, client: HttpsClient, endpoint: Endpoint, route: Route) -> None:
        self._client = client
        self._endpoint = endpoint
        self._route = route
        self._leaving = asyncio.Event()

    async def run(self) -> None:
        """Connect, again and again, until `leave`, or until cancelled."""
        while not self._leaving.is_set():
            try:
                await self._connect()
            except (*TRANSPORT_ERRORS, VzfleetError) as error:
                # The controller may be away for a while, and knows the transfer again once it has resumed it.
                log.info("the relay cannot be used now", extra={"peer": self._endpoint.peer, "reason": str(error)})
                self._endpoint.note(str(error))
            await asyncio.sleep(random.uniform(0.2, 0.6))  # noqa: S311 jitter

    def leave(self) -> None:
        """All is said: end the connection in good order."""
        self._leaving.set()

    async def _connect(self) -> None:
        path = self._route.relay or ""
        async with self._client.request(PATIENCE) as put, self._client.request(PATIENCE) as get:
            await put.start("PUT", path, _headers(self._route.relay_put) | _CHUNKED)
            await get.start("GET", path, _headers(self._route.relay_get))
            if (await get.response()).status != 200:
                raise await get.error()
            connection = self._endpoint.attach()
            try:
                await first_of(self._send_all(put, connection), self._receive(get, connection))
            finally:
                self._endpoint.detach(connection)

    async def _send_all(self, put: Request, connection: Connection) -> None:
        await first_of(self._send(put, connection), self._leaving.wait())
        if self._leaving.is_set():
            # What this end gets stays open meanwhile: who hangs up breaks both ways.
            async with asyncio.timeout(LAST):
                await put.write_chunk(b"")
                await put.response()

    async def _send(self, put: Request, connection: Connection) -> None:
        while frame := await self._endpoint.outgoing(connection):
            await put.write_chunk(frame.header + frame.payload)

    async def _receive(self, get: Request, connection: Connection) -> None:
        waiting = bytearray()
        while data := await get.read_some(READ):
            waiting += data
            try:
                self._take_frames(connection, waiting)
            except Violation as error:
                log.warning(
                    "a node does not keep to the protocol", extra={"peer": self._endpoint.peer, "why": str(error)}
                )
                self._endpoint.abort(f"malformed: {error}")

    def _take_frames(self, connection: Connection, waiting: bytearray) -> None:
        """Take whole frames out of what has arrived."""
        while len(waiting) >= HEADER:
            header = bytes(waiting[:HEADER])
            end = HEADER + payload_size(header)
            if len(waiting) < end:
                return
            payload = bytes(waiting[HEADER:end])
            del waiting[:end]
            self._endpoint.take(connection, decode(header, payload))


_CHUNKED = {"Transfer-Encoding": "chunked", "Content-Type": "application/octet-stream"}


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}
