"""Images from the controller: fetched over HTTPS, resumed after a cut, verified by sha256, unpacked by the driver."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import http.client
import logging
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from agent.drivers.base import Driver
from agent.https import TRANSPORT_ERRORS, HttpsClient, Request
from agent.locks import KeyedLocks
from agent.progress import ProgressReporter
from common.errors import DriverFailed, NoSpace, Unavailable
from common.reports import ImageSpec

log = logging.getLogger(__name__)
CHUNK = 1024 * 1024
ATTEMPTS = 10
"""Times in a row that a fetch may break off without a byte: the controller may be away for a minute."""
KEEP_PARTIAL = 24 * 3600.0
"""Seconds for which a half-fetched file is kept to be resumed."""
_PASSING = (502, 503, 504)
"""Answers of a server that is about to be there."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19}|\*)")


def _backoff(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * min(10.0, 0.2 * 2.0**attempt)  # noqa: S311 jitter


class Images:
    """The images of this node. Each is fetched and unpacked once at a time; a few different ones in parallel."""

    def __init__(
        self,
        driver: Driver,
        client: HttpsClient,
        directory: Path,
        backoff: Callable[[int], float] = _backoff,
    ) -> None:
        self._driver = driver
        self._client = client
        self._directory = directory
        self._backoff = backoff
        self._locks = KeyedLocks()
        self._slots = asyncio.Semaphore(4)

    def open(self) -> None:
        """Make the directory, and sweep files whose fetch nobody resumed for a day."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in self._directory.glob("*.part"):
            if time.time() - file.stat().st_mtime > KEEP_PARTIAL:
                file.unlink()

    async def ensure(self, image: ImageSpec, privileged: bool, report: ProgressReporter) -> int:
        """Have the image unpacked for this kind of container; the bytes that had to be fetched.

        Raises NoSpace, Unavailable (the controller cannot be reached), DriverFailed (checksum), or what the
        controller answered.
        """
        async with self._locks.hold(image.fingerprint):
            if await self._driver.has_image(image.fingerprint, privileged):
                return 0
            async with self._slots:
                file = self._directory / f"{image.fingerprint}.part"
                fetched = await self._fetch_right(image, file, report)
                try:
                    await self._driver.unpack_image(
                        image.fingerprint, image.layout, file, privileged, report, image.offset
                    )
                finally:
                    file.unlink(missing_ok=True)
                return fetched

    async def drop(self, fingerprint: str) -> None:
        """Remove the image, and what a broken fetch left of it."""
        async with self._locks.hold(fingerprint):
            (self._directory / f"{fingerprint}.part").unlink(missing_ok=True)
            await self._driver.drop_image(fingerprint)

    async def _fetch_right(self, image: ImageSpec, file: Path, report: ProgressReporter) -> int:
        """Have the file with the right content. What a cut or a crash has spoilt is fetched anew, once."""
        fetched = await self._fetch(image, file, report)
        if await self._is_right(image, file, report):
            return fetched
        log.warning("an image came damaged: it is fetched anew", extra={"image": image.fingerprint})
        file.unlink()
        fetched += await self._fetch(image, file, report)
        if await self._is_right(image, file, report):
            return fetched
        file.unlink()
        raise DriverFailed(f"the image that came is not {image.fingerprint}: its sha256 differs, twice")

    async def _fetch(self, image: ImageSpec, file: Path, report: ProgressReporter) -> int:
        fetched = fruitless = 0
        while (before := _size(file)) != image.size:
            if before > image.size:
                file.unlink()
                before = 0
            try:
                _check_room(self._directory, image.size - before)
                await self._fetch_rest(image, file, before, report)
            except NoSpace:
                # It would be in the way of whatever makes room.
                file.unlink(missing_ok=True)
                raise
            except TRANSPORT_ERRORS as error:
                log.warning("an image's fetch broke off", extra={"image": image.fingerprint, "error": str(error)})
                fruitless = 0 if _size(file) > before else fruitless + 1
                if fruitless == ATTEMPTS:
                    raise Unavailable(f"the image cannot be fetched from the controller: {error}") from None
                await asyncio.sleep(self._backoff(fruitless))
            fetched += max(0, _size(file) - before)
        return fetched

    async def _fetch_rest(self, image: ImageSpec, file: Path, offset: int, report: ProgressReporter) -> None:
        """One request for what is missing. Raises NoSpace, TRANSPORT_ERRORS, or what the controller answered."""
        headers = {"Authorization": f"Bearer {image.token}", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        async with self._client.request() as request:
            await request.start("GET", image.path, headers)
            response = await request.response()
            if response.status == 416:
                file.unlink(missing_ok=True)
                raise http.client.HTTPException("the server has no such range: starting again")
            if response.status in _PASSING:
                raise http.client.HTTPException(f"the server answered {response.status}")
            if response.status not in (200, 206):
                raise await request.error()
            start = _start_of(response) if response.status == 206 else 0
            if start != offset and start != 0:
                raise http.client.HTTPException("the server sent another range than was asked for")
            try:
                with file.open("r+b" if start else "wb") as handle:
                    handle.truncate(start)
                    handle.seek(start)
                    await self._copy(request, handle, start, image.size, report)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpace("the node's disk is full: the image cannot be fetched") from None
                raise

    async def _copy(self, request: Request, handle: BinaryIO, start: int, size: int, report: ProgressReporter) -> None:
        have = start
        while data := await request.read(CHUNK):
            have += len(data)
            if have > size:
                raise http.client.HTTPException("the server sent more than the image's size")
            await asyncio.to_thread(handle.write, data)
            report.transferred("fetching", have, size)
        if have < size:
            raise http.client.HTTPException("the server sent less than the image's size")

    async def _is_right(self, image: ImageSpec, file: Path, report: ProgressReporter) -> bool:
        report("verifying")
        return await asyncio.to_thread(_sha256, file) == image.fingerprint


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _check_room(directory: Path, wanted: int) -> None:
    free = shutil.disk_usage(directory).free
    if wanted > free:
        raise NoSpace(f"the image needs {wanted} bytes, and {directory} has {free}")


def _start_of(response: http.client.HTTPResponse) -> int:
    match = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", ""))
    if match is None:
        raise http.client.HTTPException("the server sent a part without a valid Content-Range")
    return int(match[1])


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
