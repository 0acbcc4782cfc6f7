"""Containers published as images: packed by the driver, and uploaded to the controller over HTTPS as they are packed.

Nothing is kept on this node on the way. After a cut it is packed and sent anew: the controller keeps no part of a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

import msgspec

from agent.drivers.base import Driver, Publication
from agent.https import TRANSPORT_ERRORS, HttpsClient, Request
from agent.progress import ProgressReporter
from common.commands import PublishContainer
from common.errors import TooLarge, Unavailable

log = logging.getLogger(__name__)
ATTEMPTS = 6
PATIENCE = 300.0
"""Seconds for which the controller may be silent: it writes the file to its disk."""


def _backoff(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * min(10.0, 0.4 * 2.0**attempt)  # noqa: S311 jitter


class Publishing:
    """Packs and uploads."""

    def __init__(self, driver: Driver, client: HttpsClient, backoff: Callable[[int], float] = _backoff) -> None:
        self._driver = driver
        self._client = client
        self._backoff = backoff

    async def publish(self, command: PublishContainer, report: ProgressReporter) -> int:
        """Have the controller get the image; the number of bytes.

        Raises TooLarge over the command's limit, Unavailable when the controller cannot be reached, what the driver
        raises, or what the controller answered.
        """
        for attempt in range(ATTEMPTS):
            try:
                return await self._upload(command, report)
            except (Unavailable, *TRANSPORT_ERRORS) as error:
                log.warning("an image's upload broke off", extra={"container": command.container, "error": str(error)})
                failure = str(error)
                await asyncio.sleep(self._backoff(attempt))
        raise Unavailable(f"the image cannot be uploaded to the controller: {failure}")

    async def _upload(self, command: PublishContainer, report: ProgressReporter) -> int:
        """One attempt. May raise TRANSPORT_ERRORS, too."""
        metadata = metadata_yaml(command.architecture, command.created_at, command.properties)
        publication = Publication(command.container, command.snapshot, metadata, command.compression, command.force)
        stream = self._driver.publish(publication)
        headers = {"Authorization": f"Bearer {command.token}", "Content-Type": "application/octet-stream"}
        try:
            async with self._client.request(PATIENCE) as request:
                await request.start("PUT", command.path, headers | {"Transfer-Encoding": "chunked"})
                sent = await _send(request, stream, command.limit, report)
                response = await request.response()
                if not 200 <= response.status < 300:
                    raise await request.error()
                return sent
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()


async def _send(request: Request, stream: AsyncIterator[bytes], limit: int, report: ProgressReporter) -> int:
    sent = 0
    async for data in stream:
        sent += len(data)
        if sent > limit:
            raise TooLarge(f"the image is over the controller's limit of {limit} bytes", allowed=f"at most {limit}")
        try:
            await request.write_chunk(data)
        except TRANSPORT_ERRORS:
            await _explain(request)
            raise
        report.transferred("publishing", sent)
    await request.write_chunk(b"")
    return sent


async def _explain(request: Request) -> None:
    """Raise what the controller answered before it closed the connection, if it did answer."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        response = await request.response()
        if response.status >= 400:
            raise await request.error()


def metadata_yaml(architecture: str, created_at: int, properties: Mapping[str, str]) -> bytes:
    """LXD's metadata.yaml. Its texts are quoted as JSON, which YAML understands; they hold no control characters."""
    lines = [f"architecture: {_quoted(architecture)}", f"creation_date: {created_at}"]
    if properties:
        lines += ["properties:", *(f"  {_quoted(name)}: {_quoted(value)}" for name, value in properties.items())]
    return "\n".join((*lines, "")).encode()


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()
