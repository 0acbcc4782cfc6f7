"""For agents: fetching image files, and the relay for a container's data. Each with a token for that one operation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import stream_request_body

from common.errors import InvalidRequest, VzfleetError
from controller.api.base import Handler
from controller.api.identity import Right, bearer
from controller.api.limits import expect_stream
from controller.relay import Sender

CHUNK = 256 * 1024


class ImageFile(Handler):
    """GET: an image's file, or the part of it after `Range: bytes=N-`."""

    rights = {"GET": Right.PUBLIC}

    async def get(self, fingerprint: str) -> None:
        path = self.services.images.file_for(fingerprint, bearer(self.request))
        size = path.stat().st_size
        start = self._start(size)
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Accept-Ranges", "bytes")
        self.set_header("Content-Length", str(size - start))
        if start:
            self.set_status(206)
            self.set_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        try:
            async for chunk in _read(path, start):
                self.write(chunk)
                await self.flush()
        except StreamClosedError:
            return

    def _start(self, size: int) -> int:
        text = self.request.headers.get("Range", "")
        if not text:
            return 0
        first = text.removeprefix("bytes=").removesuffix("-")
        if (
            not text.startswith("bytes=")
            or not first.isascii()
            or not first.isdigit()
            or int(first[:20]) >= max(size, 1)
        ):
            raise InvalidRequest("unsupported range", field="Range", allowed=f"bytes=N- with N below {size}")
        return int(first)


async def _read(path: Path, start: int) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    with path.open("rb") as handle:
        handle.seek(start)
        while chunk := await loop.run_in_executor(None, handle.read, CHUNK):
            yield chunk


@stream_request_body
class Transfer(Handler):
    """PUT: the sender's end of a transfer. GET: the receiver's."""

    rights = {"GET": Right.PUBLIC, "PUT": Right.PUBLIC}
    while_reconciling = True
    sender: Sender | None = None

    async def prepare(self) -> None:
        await super().prepare()
        if self.request.method == "PUT":
            expect_stream(self.request)
            self.sender = self.services.relay.sender(bearer(self.request))

    async def data_received(self, chunk: bytes) -> None:
        if self.sender is None:
            return
        try:
            await self.sender.write(chunk)
        except VzfleetError:
            # The receiver is gone; the rest is not read. Both nodes answer their commands with why.
            connection: Any = self.request.connection
            connection.stream.close()

    async def put(self, _transfer: str) -> None:
        if self.sender is not None:
            self.answer({"bytes": await self.sender.finish()})

    async def get(self, _transfer: str) -> None:
        self.set_header("Content-Type", "application/octet-stream")
        async with self.services.relay.receive(bearer(self.request)) as chunks:
            try:
                async for chunk in chunks:
                    self.write(chunk)
                    await self.flush()
            except (VzfleetError, StreamClosedError):
                # Without the last chunk of HTTP's framing, so that it does not look complete.
                connection: Any = self.request.connection
                connection.stream.close()

    def on_connection_close(self) -> None:
        if self.sender is not None:
            self.sender.abort("its connection broke")


routes = [
    (r"/1\.0/internal/images/([0-9a-f]{64})", ImageFile),
    (r"/1\.0/internal/transfers/([0-9a-f-]{36})", Transfer),
]
