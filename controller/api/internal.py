"""For agents: fetching and publishing image files, and the relay for a container's data.

Each with a token for that one operation.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import stream_request_body

from common.errors import Forbidden, InvalidRequest, VzfleetError
from controller.api.base import Handler
from controller.api.identity import Right, bearer
from controller.api.limits import expect_stream
from controller.images.files import StagedImage
from controller.relay import Receiver, Sender

CHUNK = 128 * 1024


class ImageFile(Handler):
    """GET: an image's file, or the part of it after `Range: bytes=N-`."""

    rights = {"GET": Right.PUBLIC}

    async def get(self, fingerprint: str) -> None:
        ticket = bearer(self.request)
        path = self.services.images.file_for(fingerprint, ticket)
        if self.services.operations.under_way(ticket.partition(".")[0]) is None:
            raise Forbidden("this token's operation has ended")
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
class Publication(Handler):
    """PUT: the image that a node makes of a container, from its beginning."""

    rights = {"PUT": Right.PUBLIC}
    staged: StagedImage | None = None
    refusal: VzfleetError | None = None

    async def prepare(self) -> None:
        await super().prepare()
        if self.request.method == "PUT":
            self.staged = self.services.deposits.begin(self.path_args[0], bearer(self.request))
            expect_stream(self.request)

    async def data_received(self, chunk: bytes) -> None:
        if self.staged is None:
            return
        try:
            await self.staged.write(chunk)
        except VzfleetError as error:
            # The rest is read to no purpose, so that the node gets the answer.
            self._throw_away()
            self.refusal = error

    async def put(self, operation: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self.staged is not None:
            fingerprint = await self.services.deposits.finish(operation, self.staged)
            # It is the operation's from now on.
            self.staged = None
            self.answer({"fingerprint": fingerprint})

    def on_connection_close(self) -> None:
        self._throw_away()

    def on_finish(self) -> None:
        super().on_finish()
        self._throw_away()

    def _throw_away(self) -> None:
        if self.staged is not None:
            self.staged.discard()
            self.staged = None


@stream_request_body
class Transfer(Handler):
    """PUT: what one end of a transfer sends. GET: what the other end sends to it."""

    rights = {"GET": Right.PUBLIC, "PUT": Right.PUBLIC}
    while_reconciling = True
    sender: Sender | None = None
    receiver: Receiver | None = None

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
            # The other end is gone; the rest is not read.
            self._break()

    async def put(self, _transfer: str) -> None:
        if self.sender is not None:
            self.answer({"bytes": await self.sender.finish()})

    async def get(self, _transfer: str) -> None:
        self.receiver = self.services.relay.receiver(bearer(self.request))
        self.set_header("Content-Type", "application/octet-stream")
        async with self.receiver as chunks:
            try:
                # The head goes out at once: the other end may not be there yet.
                await self.flush()
                async for chunk in chunks:
                    self.write(chunk)
                    await self.flush()
            except (VzfleetError, StreamClosedError):
                # Without the last chunk of HTTP's framing, so that it does not look complete.
                self._break()

    def on_connection_close(self) -> None:
        for side in (self.sender, self.receiver):
            if side is not None:
                side.abort("its connection broke")

    def _break(self) -> None:
        connection: Any = self.request.connection
        connection.stream.close()


routes = [
    (r"/1\.0/internal/images/([0-9a-f]{64})", ImageFile),
    (r"/1\.0/internal/publications/([0-9a-f-]{36})", Publication),
    (r"/1\.0/internal/transfers/([0-9a-f-]{36})", Transfer),
]
