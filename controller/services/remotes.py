"""Images of other servers: fetched once for all who want one, and their newer versions."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from common.clock import Clock, timestamp
from common.errors import Conflict, NotFound, Unavailable
from controller.fleet import Fleet
from controller.images.download import Downloads
from controller.images.files import ImageFiles
from controller.images.inspect import inspect, inspect_split
from controller.images.servers import ImageServers, Keep, RemoteSource
from controller.images.simplestreams import RemoteImage, canonical
from controller.images.wishes import Wish, find, is_meant
from controller.records import Image, ImageOrigin
from controller.services.image_sources import ImageSources
from controller.services.images import Images
from controller.services.shared_work import Hear, SharedWork
from controller.store import images as rows
from controller.store.db import Database, Transaction

log = logging.getLogger(__name__)
STEP = 2**20
"""Bytes between two reports of a download."""


@dataclass(frozen=True)
class Obtained:
    """An image that is here now, and its version on its server where that is known."""

    image: Image
    serial: str = ""


class Remotes:
    """Images of image servers and of URLs. `limit` is what an image may have, in bytes."""

    def __init__(
        self,
        store: Database,
        fleet: Fleet,
        files: ImageFiles,
        images: Images,
        downloads: Downloads,
        clock: Clock,
        servers: ImageServers,
        sources: ImageSources,
        limit: int,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._files = files
        self._images = images
        self._downloads = downloads
        self._clock = clock
        self._servers = servers
        self._sources = sources
        self._limit = limit
        self._work: SharedWork[Image] = SharedWork()
        self.obtained_at: dict[str, float] = {}
        """When (monotonic) an image of a server was last wanted: it may not be made use of yet."""

    # ------------------------------------------------------------ fetching

    async def obtain(self, remote: RemoteSource, hear: Hear) -> Obtained:
        """The newest image that is meant; several who want it wait for one download.

        When the server cannot be reached, what was fetched for the same alias before will do. Raises Unavailable naming
        the server, NotFound, Unsupported, InvalidRequest, TooLarge, NoSpace, DeadlinePassed.
        """
        hear({"stage": f"asking {remote.name}"})
        try:
            found = find(await self._servers.catalogue(remote.url), remote.wish)
        except Unavailable as error:
            known = self._fetched_before(remote)
            if known is None:
                raise Unavailable(f"image server {remote.name} ({remote.url}): {error.text}") from None
            log.warning("an image server is out of reach", extra={"server": remote.url, "reason": error.text})
            return self._wanted(Obtained(known))
        try:
            image = await self._obtain(remote, found, hear)
        except NotFound:
            # Servers remove old versions: it was one of the last hour.
            newest = find(await self._servers.catalogue(remote.url, fresh=True), remote.wish)
            if newest.fingerprint == found.fingerprint:
                raise
            found, image = newest, await self._obtain(remote, newest, hear)
        return self._wanted(Obtained(image, found.serial))

    def _wanted(self, obtained: Obtained) -> Obtained:
        self.obtained_at[obtained.image.fingerprint] = self._clock.monotonic()
        return obtained

    async def _obtain(self, remote: RemoteSource, found: RemoteImage, hear: Hear) -> Image:
        present = self._fleet.images.get(found.fingerprint)
        if present is not None:
            return present
        return await self._work.do(found.fingerprint, lambda tell: self._download(remote, found, tell), hear)

    def _fetched_before(self, remote: RemoteSource) -> Image | None:
        """The newest that was fetched from this server and would do."""
        for image in sorted(self._fleet.images.values(), key=lambda each: each.created_at, reverse=True):
            origin = image.origin
            if origin is None or origin.protocol != "simplestreams" or origin.server != remote.url:
                continue
            if is_meant(RemoteImage(image.fingerprint, "", "", (origin.alias,), image.properties, ()), remote.wish):
                return image
        return None

    async def _download(self, remote: RemoteSource, found: RemoteImage, tell: Hear) -> Image:
        meter = _Meter(self._clock, tell)
        staged, offset = await self._servers.fetch(remote, found, self._files, meter, self._limit)
        try:
            tell({"stage": "inspecting"})
            facts = await (inspect_split(staged.path, offset) if offset else inspect(staged.path))
            alias = remote.wish.alias or (found.aliases[0] if found.aliases else "")
            image = Image(
                fingerprint=found.fingerprint,
                layout=facts.layout,
                size=staged.size,
                properties={**facts.properties, **found.properties},
                aliases=(),
                source="",
                filename=found.files[-1].path.rpartition("/")[2][:255],
                created_at=timestamp(self._clock.now()),
                rootfs_offset=offset,
                cached=True,
                origin=ImageOrigin("simplestreams", remote.url, alias),
            )
            return await self._images.keep(staged, image)
        finally:
            staged.discard()

    # ------------------------------------------------------------ by a request of its own

    async def pull(self, remote: RemoteSource, keep: Keep, hear: Hear) -> Obtained:
        """Have an image of a server as one's own. Raises what `obtain` raises, Conflict for an alias."""
        obtained = await self.obtain(remote, hear)
        return Obtained(await self._keep(obtained.image.fingerprint, keep), obtained.serial)

    async def pull_url(self, url: str, expected: str, keep: Keep, hear: Hear) -> Image:
        """Have the image that a URL leads to; its sha256 must be `expected` unless that is empty.

        Raises what `obtain` raises, Conflict for an alias.
        """
        if expected not in self._fleet.images:
            fetched = await self._work.do(f"{url}\n{expected}", lambda tell: self._fetch(url, expected, tell), hear)
            expected = fetched.fingerprint
        return await self._keep(expected, keep)

    async def _fetch(self, url: str, expected: str, tell: Hear) -> Image:
        staged = self._files.stage(self._limit)
        try:
            meter = _Meter(self._clock, tell)
            await self._downloads.fetch(url, staged, meter, limit=self._limit, sha256=expected or None)
            fingerprint, _ = await staged.finish()
            tell({"stage": "inspecting"})
            facts = await inspect(staged.path)
            architecture = {"architecture": facts.architecture} if facts.architecture else {}
            image = Image(
                fingerprint=fingerprint,
                layout=facts.layout,
                size=staged.size,
                properties=architecture | facts.properties,
                aliases=(),
                source="",
                filename=url.partition("?")[0].rpartition("/")[2][:255],
                created_at=timestamp(self._clock.now()),
                cached=True,
                origin=ImageOrigin("direct", url.partition("?")[0]),
            )
            return await self._images.keep(staged, image)
        finally:
            staged.discard()

    async def _keep(self, fingerprint: str, keep: Keep) -> Image:
        def write(transaction: Transaction) -> Image:
            image = rows.rows.get(transaction.connection, fingerprint)
            if image is None:
                raise NotFound(f"image {fingerprint[:12]} was deleted meanwhile")
            _require_free(transaction, keep.aliases, (fingerprint,))
            kept = msgspec.structs.replace(
                image,
                aliases=tuple(dict.fromkeys((*image.aliases, *keep.aliases))),
                descriptions={**image.descriptions, **keep.descriptions},
                properties={**image.properties, **keep.properties},
                filename=keep.filename or image.filename,
                public=image.public or keep.public,
                auto_update=image.auto_update or keep.auto_update,
                cached=False,
                expires_at=keep.expires_at,
            )
            return rows.rows.replace(transaction, kept)

        return await self._store.write(write)

    # ------------------------------------------------------------ newer versions

    def origin_of(self, image: Image) -> RemoteSource:
        """Where newer versions of an image are. Raises Conflict when it has not come from an image server."""
        origin = image.origin
        if origin is None or origin.protocol != "simplestreams" or not origin.alias:
            raise Conflict(
                f"image {image.fingerprint[:12]} has no newer versions: it has not come from an image server",
                field="fingerprint",
            )
        name = self._sources.name_of(origin.server)
        architecture = canonical(image.properties.get("architecture", ""))
        return RemoteSource(origin.server, name, Wish(alias=origin.alias, architecture=architecture))

    async def has_newer(self, image: Image) -> bool:
        """Whether its server has a newer version. Raises what `obtain` raises, Conflict."""
        remote = self.origin_of(image)
        found = find(await self._servers.catalogue(remote.url), remote.wish)
        return found.fingerprint != image.fingerprint

    async def refresh(self, fingerprint: str, hear: Hear) -> Obtained:
        """Have the newest version take the place of an image; the old one is then forgotten when nobody needs it.

        Raises what `obtain` raises, NotFound, Conflict.
        """
        image = self._images.by_fingerprint(fingerprint)
        remote = self.origin_of(image)
        hear({"stage": f"asking {remote.name}"})
        try:
            found = find(await self._servers.catalogue(remote.url, fresh=True), remote.wish)
        except Unavailable as error:
            raise Unavailable(f"image server {remote.name} ({remote.url}): {error.text}") from None
        if found.fingerprint == fingerprint:
            return Obtained(image, found.serial)
        newer = await self._obtain(remote, found, hear)
        await self._store.write(lambda transaction: self._succeed(transaction, fingerprint, newer.fingerprint))
        self.obtained_at.pop(fingerprint, None)
        return self._wanted(Obtained(newer, found.serial))

    def _succeed(self, transaction: Transaction, old: str, new: str) -> None:
        """The new image gets the names of the old one, and what was said of it; again is success."""
        before = rows.rows.get(transaction.connection, old)
        after = rows.rows.get(transaction.connection, new)
        if after is None:
            raise NotFound(f"image {new[:12]} was deleted meanwhile")
        if before is None:
            return
        now = timestamp(self._clock.now())
        spent = msgspec.structs.replace(
            before, aliases=(), descriptions={}, auto_update=False, cached=True, expires_at=now
        )
        rows.rows.replace(transaction, spent)
        heir = msgspec.structs.replace(
            after,
            aliases=tuple(dict.fromkeys((*after.aliases, *before.aliases))),
            descriptions={**before.descriptions, **after.descriptions},
            public=after.public or before.public,
            auto_update=after.auto_update or before.auto_update,
            cached=after.cached and before.cached,
            last_used_at=after.last_used_at or before.last_used_at,
        )
        rows.rows.replace(transaction, heir)


class _Meter:
    """Makes bytes into notes of progress."""

    def __init__(self, clock: Clock, tell: Hear) -> None:
        self._clock = clock
        self._tell = tell
        self._begun = clock.monotonic()
        self._told = -STEP

    def __call__(self, have: int, total: int | None) -> None:
        if have - self._told < STEP and have != total:
            return
        self._told = have
        elapsed = self._clock.monotonic() - self._begun
        note: dict[str, object] = {"stage": "downloading", "processed": have}
        if total:
            note |= {"total": total, "percent": min(100, have * 100 // total)}
        if elapsed > 0 and have:
            note["speed"] = int(have / elapsed)
            if total:
                note["remaining"] = round((total - have) * elapsed / have)
        self._tell(note)


def _require_free(transaction: Transaction, aliases: tuple[str, ...], but: tuple[str, ...]) -> None:
    for other in rows.rows.all(transaction.connection):
        if other.fingerprint not in but and (taken := set(other.aliases) & set(aliases)):
            raise Conflict(f"the alias {min(taken)!r} belongs to another image", field="alias")
