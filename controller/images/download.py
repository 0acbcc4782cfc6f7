"""Files of other servers, fetched over HTTPS into the staging of image files: resumed, bounded, verified."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.errors import DeadlinePassed, InvalidRequest, NotFound, TooLarge, Unavailable
from controller.images.files import StagedImage
from controller.images.https import BrokenOff, Head, HttpsClient

ATTEMPTS = 6
TOTAL_TIME = 6 * 3600.0
"""Seconds for one file, all attempts together."""
DOCUMENT_TIME = 120.0
DOCUMENT_ATTEMPTS = 3
"""Somebody waits for it."""
MAX_DOCUMENT = 32 * 2**20
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19}|\*)")
ReportTransfer = Callable[[int, int | None], None]
"""Called with the bytes that came so far and their total, or None where that is not known."""


def backoff(attempt: int) -> float:
    """Seconds before the next attempt (0, 1, …), with jitter."""
    return random.uniform(0.5, 1.0) * min(30.0, 0.5 * 2.0**attempt)  # noqa: S311 - jitter


@dataclass(frozen=True)
class Document:
    """A whole small file: None as its content means that it has not changed since `etag`."""

    content: bytes | None
    etag: str


class Downloads:
    """Fetches files."""

    def __init__(
        self,
        client: HttpsClient,
        *,
        attempts: int = ATTEMPTS,
        total_time: float = TOTAL_TIME,
        pause: Callable[[int], float] = backoff,
    ) -> None:
        self._client = client
        self._attempts = attempts
        self._total_time = total_time
        self._pause = pause

    async def fetch(
        self,
        url: str,
        staged: StagedImage,
        report: ReportTransfer,
        *,
        limit: int,
        size: int | None = None,
        sha256: str | None = None,
    ) -> None:
        """Append a file of at most `limit` bytes to `staged`; `size` and `sha256` are checked where they are known.

        Raises Unavailable, NotFound, TooLarge, InvalidRequest (it is not the file that was meant), NoSpace,
        DeadlinePassed. `staged` is then to be thrown away.
        """
        try:
            async with asyncio.timeout(self._total_time):
                file = _Fetching(url, staged, report, limit, size)
                await self._attempt(file)
        except TimeoutError:
            raise DeadlinePassed(f"{_name(url)} was not fetched within {self._total_time:g} s") from None
        file.verify(sha256)

    async def _attempt(self, file: _Fetching) -> None:
        await file.prepare()
        for attempt in range(self._attempts):
            before = file.have
            try:
                await self._client.get(file.url, file.headers(), file.begin, file.take)
                file.check_whole()
                return
            except BrokenOff as error:
                if attempt + 1 == self._attempts:
                    raise Unavailable(f"{_name(file.url)} cannot be fetched: {error.text}") from None
                await asyncio.sleep(self._pause(0 if file.have > before else attempt))

    async def document(self, url: str, etag: str = "", limit: int = MAX_DOCUMENT) -> Document:
        """A small file as a whole, or that it has not changed. Raises what `fetch` raises."""
        document = _Reading(url, limit)
        headers = {"If-None-Match": etag} if etag else {}
        try:
            async with asyncio.timeout(DOCUMENT_TIME):
                head = await self._read(document, headers)
        except TimeoutError:
            raise Unavailable(f"{_name(url)} was not fetched within {DOCUMENT_TIME:g} s") from None
        if head.status == 304:
            return Document(None, etag)
        return Document(bytes(document.content), head.headers.get("ETag", "")[:256])

    async def _read(self, document: _Reading, headers: dict[str, str]) -> Head:
        for attempt in range(DOCUMENT_ATTEMPTS):
            try:
                return await self._client.get(document.url, headers, document.begin, document.take)
            except BrokenOff as error:
                failure = error.text
            if attempt + 1 < DOCUMENT_ATTEMPTS:
                await asyncio.sleep(self._pause(attempt))
        raise Unavailable(failure)


class _Fetching:
    """A file that is being fetched, over several requests. `have` counts its own bytes that are staged."""

    def __init__(self, url: str, staged: StagedImage, report: ReportTransfer, limit: int, size: int | None) -> None:
        self.url = url
        self.have = 0
        self._staged = staged
        self._report = report
        self._limit = limit
        self._size = size
        self._total = size
        self._etag = ""
        self._hash = hashlib.sha256()

    async def prepare(self) -> None:
        """Remember where in the staged file it begins. Raises TooLarge, NoSpace."""
        if self._size is not None and self._size > self._limit:
            raise _too_large(self.url, self._limit)
        self._start = await self._staged.mark()

    def headers(self) -> dict[str, str]:
        """What to ask for next: all of it, or what is missing while it is the same file (RFC 9110, 13.1.5)."""
        if not self.have or not self._etag:
            return {}
        return {"Range": f"bytes={self.have}-", "If-Range": self._etag}

    async def begin(self, head: Head) -> None:
        """Judge an answer's head."""
        _check_status(head, (200, 206))
        start = 0
        if head.status == 206:
            match = _CONTENT_RANGE.fullmatch(head.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != self.have:
                self._etag = ""
                raise BrokenOff("the server sent another range than was asked for")
            start = self.have
        if start == 0 and self.have:
            await self._again()
        etag = head.headers.get("ETag", "")
        # A weak one does not say that the bytes are the same.
        self._etag = etag if etag.startswith('"') and len(etag) <= 256 else ""
        self._expect(start, head.headers.get("Content-Length", ""))

    def _expect(self, start: int, length: str) -> None:
        if not length.isascii() or not length.isdigit():
            return
        total = start + int(length[:19])
        if total > self._limit:
            raise _too_large(self.url, self._limit)
        if self._size is None:
            self._total = total
        elif total != self._size:
            raise InvalidRequest(f"{_name(self.url)} has {total} bytes, and {self._size} were expected")

    async def _again(self) -> None:
        await self._staged.rewind(self._start)
        self.have, self._hash = 0, hashlib.sha256()

    async def take(self, chunk: bytes) -> None:
        """Stage what came. Raises TooLarge, NoSpace."""
        self.have += len(chunk)
        if self.have > (self._limit if self._size is None else self._size):
            raise _too_large(self.url, self._limit if self._size is None else self._size)
        await asyncio.to_thread(self._hash.update, chunk)
        await self._staged.write(chunk)
        self._report(self.have, self._total)

    def check_whole(self) -> None:
        """Raise BrokenOff when an answer ended before the file did."""
        if self._total is not None and self.have < self._total:
            raise BrokenOff(f"{_name(self.url)} broke off after {self.have} of {self._total} bytes")

    def verify(self, sha256: str | None) -> None:
        """Raise InvalidRequest unless it is the file that was meant."""
        found = self._hash.hexdigest()
        if sha256 is not None and found != sha256:
            raise InvalidRequest(
                f"{_name(self.url)} is not what was expected: its sha256 is {found}", field="source", allowed=sha256
            )


class _Reading:
    """A small file that is being read into memory."""

    def __init__(self, url: str, limit: int) -> None:
        self.content = bytearray()
        self.url = url
        self._limit = limit

    async def begin(self, head: Head) -> None:
        self.content.clear()
        _check_status(head, (200, 304))

    async def take(self, chunk: bytes) -> None:
        self.content += chunk
        if len(self.content) > self._limit:
            raise _too_large(self.url, self._limit)


def _check_status(head: Head, good: tuple[int, ...]) -> None:
    host = urlsplit(head.url).hostname
    if head.status in good:
        return
    if head.status in (404, 410):
        raise NotFound(f"{host} has no {urlsplit(head.url).path[:200]}", field="source")
    if head.status == 429 or head.status >= 500 or head.status == 416:
        raise BrokenOff(f"{host} answered {head.status}")
    raise Unavailable(f"{host} answered {head.status} for {urlsplit(head.url).path[:200]}")


def _too_large(url: str, limit: int) -> TooLarge:
    return TooLarge(f"{_name(url)} is too large", field="source", allowed=f"at most {limit} bytes")


def _name(url: str) -> str:
    """A URL as errors name it: without its query, which may hold a secret."""
    parts = urlsplit(url)
    return f"https://{parts.netloc}{parts.path}"[:300]
