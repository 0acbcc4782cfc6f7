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
ATTEMPTS = 6
KEEP_PARTIAL = 24 * 3600.0
"""Seconds for which a half-fetched file is kept to be resumed."""
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
                fetched = await self._fetch(image, file, report)
                try:
                    await self._verify(image, file, report)
                    await self._driver.unpack_image(image.fingerprint, image.layout, file, privileged, report)
                finally:
                    file.unlink(missing_ok=True)
                return fetched

    async def drop(self, fingerprint: str) -> None:
        """Remove the image, and what a broken fetch left of it."""
        async with self._locks.hold(fingerprint):
            (self._directory / f"{fingerprint}.part").unlink(missing_ok=True)
            await self._driver.drop_image(fingerprint)

    async def _fetch(self, image: ImageSpec, file: Path, report: ProgressReporter) -> int:
        fetched = 0
        for attempt in range(ATTEMPTS):
            before = _size(file)
            if before > image.size:
                file.unlink()
                before = 0
            if before == image.size:
                return fetched
            _check_room(self._directory, image.size - before)
            try:
                fetched += await self._fetch_rest(image, file, before, report)
            except TRANSPORT_ERRORS as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpace("the node's disk is full: the image cannot be fetched") from None
                log.warning("an image's fetch broke off", extra={"image": image.fingerprint, "error": str(error)})
                failure = str(error)
                await asyncio.sleep(self._backoff(attempt))
        if _size(file) == image.size:
            return fetched
        raise Unavailable(f"the image cannot be fetched from the controller: {failure}")

    async def _fetch_rest(self, image: ImageSpec, file: Path, offset: int, report: ProgressReporter) -> int:
        """One request for what is missing; the number of bytes that came."""
        headers = {"Authorization": f"Bearer {image.token}", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        async with self._client.request() as request:
            await request.start("GET", image.path, headers)
            response = await request.response()
            if response.status == 416:
                file.unlink(missing_ok=True)
                raise http.client.HTTPException("the server has no such range: starting again")
            if response.status not in (200, 206):
                raise await request.error()
            start = _start_of(response) if response.status == 206 else 0
            if start != offset and start != 0:
                raise http.client.HTTPException("the server sent another range than was asked for")
            with file.open("r+b" if start else "wb") as handle:
                handle.truncate(start)
                handle.seek(start)
                return await self._copy(request, handle, start, image.size, report)

    async def _copy(self, request: Request, handle: BinaryIO, start: int, size: int, report: ProgressReporter) -> int:
        have = start
        while data := await request.read(CHUNK):
            have += len(data)
            if have > size:
                raise http.client.HTTPException("the server sent more than the image's size")
            await asyncio.to_thread(handle.write, data)
            report.transferred("fetching", have, size)
        if have < size:
            raise http.client.HTTPException("the server sent less than the image's size")
        return have - start

    async def _verify(self, image: ImageSpec, file: Path, report: ProgressReporter) -> None:
        report("verifying")
        if await asyncio.to_thread(_sha256, file) != image.fingerprint:
            raise DriverFailed(f"the image that came is not {image.fingerprint}: its sha256 differs")


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
