"""Image servers: what each has, kept for a while, and fetching an image's files from one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial

from msgspec import Struct

from common.clock import Clock
from common.errors import InvalidRequest, Unavailable
from controller.images import simplestreams
from controller.images.download import Downloads, ReportTransfer
from controller.images.files import ImageFiles, StagedImage
from controller.images.simplestreams import Catalogue, RemoteImage
from controller.images.wishes import Wish

MOST_SERVERS = 8
"""Servers whose catalogues are kept in memory."""


class RemoteSource(Struct, frozen=True):
    """An image of a server: its URL, what it is called here (or the URL again), and which image is meant."""

    url: str
    name: str
    wish: Wish

    @property
    def key(self) -> str:
        """The same for all who mean the same."""
        wish = self.wish
        properties = ",".join(f"{name}={value}" for name, value in sorted(wish.properties.items()))
        return "\n".join((self.url, wish.alias, wish.fingerprint, properties, wish.architecture))


class Keep(Struct, frozen=True):
    """What is said of an image that is pulled by a request of its own; `properties` go over its own.

    `descriptions` are those of its aliases that have one.
    """

    aliases: tuple[str, ...] = ()
    properties: dict[str, str] = {}
    public: bool = False
    auto_update: bool = False
    expires_at: str | None = None
    filename: str = ""
    descriptions: dict[str, str] = {}


@dataclass
class _Kept:
    """A server's catalogue, when it was read, and its documents with the tags by which they are asked for again."""

    catalogue: Catalogue | None = None
    read_at: float = 0.0
    etags: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    parts: dict[str, Catalogue] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ImageServers:
    """The servers that were asked lately. `lifetime` in seconds is how long what one has is not asked for again."""

    def __init__(self, downloads: Downloads, clock: Clock, lifetime: float) -> None:
        self._downloads = downloads
        self._clock = clock
        self._lifetime = lifetime
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def cached(self, url: str) -> Catalogue | None:
        """What a server has, if that was asked not long ago."""
        kept = self._kept.get(url)
        return kept.catalogue if kept is not None and self._is_fresh(kept) else None

    async def catalogue(self, url: str, fresh: bool = False) -> Catalogue:
        """What a server has; `fresh`: as it is now. Raises Unavailable naming the server, InvalidRequest."""
        kept = self._kept.setdefault(url, _Kept())
        self._kept.move_to_end(url)
        while len(self._kept) > MOST_SERVERS:
            self._kept.popitem(last=False)
        async with kept.lock:
            if kept.catalogue is not None and not fresh and self._is_fresh(kept):
                return kept.catalogue
            catalogue = await self._read(url, kept)
            kept.catalogue, kept.read_at = catalogue, self._clock.monotonic()
            return catalogue

    def _is_fresh(self, kept: _Kept) -> bool:
        return kept.catalogue is not None and self._clock.monotonic() - kept.read_at < self._lifetime

    async def _read(self, url: str, kept: _Kept) -> Catalogue:
        index = await self._document(url, simplestreams.INDEX, kept)
        if index is not None:
            kept.paths = simplestreams.read_index(index)
        for path in kept.paths:
            content = await self._document(url, path, kept)
            if content is not None:
                # Megabytes of JSON.
                kept.parts[path] = await asyncio.to_thread(simplestreams.read_products, content)
        kept.parts = {path: kept.parts[path] for path in kept.paths}
        return simplestreams.join(list(kept.parts.values()))

    async def _document(self, url: str, path: str, kept: _Kept) -> bytes | None:
        """A document's content; None when it is as it was."""
        known = path in kept.parts or (path == simplestreams.INDEX and bool(kept.paths))
        etag = kept.etags.pop(path, "") if known else ""
        document = await self._downloads.document(simplestreams.url_of(url, path), etag)
        if document.content is None and not etag:
            raise Unavailable(f"the image server {url} sent nothing")
        kept.etags[path] = document.etag
        return document.content

    async def fetch(
        self, source: RemoteSource, image: RemoteImage, files: ImageFiles, report: ReportTransfer, limit: int
    ) -> tuple[StagedImage, int]:
        """The finished file of an image, verified, and where in it the root file system's archive begins (0: unified).

        Raises what `Downloads.fetch` raises, InvalidRequest when the files together are not what was promised.
        """
        staged, total = files.stage(limit), image.size
        try:
            offset = 0
            for file in image.files:
                # Of two files, the second is the root file system.
                offset = staged.size
                await self._downloads.fetch(
                    simplestreams.url_of(source.url, file.path),
                    staged,
                    partial(_add_up, report, offset, total),
                    limit=limit - offset,
                    size=file.size,
                    sha256=file.sha256,
                )
            fingerprint, _ = await staged.finish()
            if fingerprint != image.fingerprint:
                raise InvalidRequest(f"{image.product} of {source.name} is not {image.fingerprint}: the sha256 differs")
        except BaseException:
            staged.discard()
            raise
        return staged, offset


def _add_up(report: ReportTransfer, before: int, total: int, have: int, _: int | None) -> None:
    report(before + have, total)
