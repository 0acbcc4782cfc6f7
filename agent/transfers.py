"""A container's data to and from the controller's relay, as one stream over HTTPS."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from agent.drivers.base import Driver
from agent.https import TRANSPORT_ERRORS, HttpsClient, Request
from agent.progress import ProgressReporter
from common.commands import ReceiveContainer, SendContainer
from common.errors import Unavailable

CHUNK = 1024 * 1024
PATIENCE = 300.0
"""Seconds for which the relay may be silent: it waits for the other node."""


class Transfers:
    """Streams containers; nothing is kept on this node's disk on the way."""

    def __init__(self, driver: Driver, client: HttpsClient) -> None:
        self._driver = driver
        self._client = client

    async def send(self, command: SendContainer, report: ProgressReporter) -> int:
        """Send a stopped container's or a snapshot's data; the number of bytes. Raises Unavailable when it breaks."""
        stream = self._driver.send(command.container, command.snapshot, command.with_snapshots)
        try:
            async with self._client.request(PATIENCE) as request:
                headers = _headers(command.token)
                headers |= {"Transfer-Encoding": "chunked", "Content-Type": "application/octet-stream"}
                await request.start("PUT", command.path, headers)
                sent = await _send_body(request, stream, report)
                response = await request.response()
                if not 200 <= response.status < 300:
                    raise await request.error()
                return sent
        except TRANSPORT_ERRORS as error:
            raise Unavailable(f"the transfer broke off: {error}") from None
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()

    async def receive(self, command: ReceiveContainer, report: ProgressReporter) -> int:
        """Make a container from the relay's stream; the number of bytes. Raises Unavailable when it breaks."""
        received = 0

        async def counted(request: Request) -> AsyncIterator[bytes]:
            nonlocal received
            while data := await request.read(CHUNK):
                received += len(data)
                report.transferred("receiving", received)
                yield data

        try:
            async with self._client.request(PATIENCE) as request:
                await request.start("GET", command.path, _headers(command.token))
                response = await request.response()
                if response.status != 200:
                    raise await request.error()
                if not response.chunked and response.length is None:
                    # Such a body ends with the connection: a cut could not be told from the end.
                    raise Unavailable("the relay's answer has no length")
                await self._driver.receive(command.spec, counted(request))
                return received
        except TRANSPORT_ERRORS as error:
            raise Unavailable(f"the transfer broke off: {error}") from None


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}


async def _send_body(request: Request, stream: AsyncIterator[bytes], report: ProgressReporter) -> int:
    sent = 0
    async for data in stream:
        if not data:
            continue
        try:
            await request.write_chunk(data)
        except TRANSPORT_ERRORS:
            await _explain(request)
            raise
        sent += len(data)
        report.transferred("sending", sent)
    await request.write_chunk(b"")
    return sent


async def _explain(request: Request) -> None:
    """Raise what the relay answered before it closed the connection, if it did answer."""
    with contextlib.suppress(*TRANSPORT_ERRORS):
        response = await request.response()
        if response.status >= 400:
            raise await request.error()
