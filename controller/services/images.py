"""Images: which one a request means, building what is missing, taking in uploads, tokens for fetching files."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from common.clock import Clock, timestamp
from common.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unavailable, VzfleetError
from common.names import check_alias
from controller.fleet import Fleet
from controller.images.builders import Builder, find_builder
from controller.images.files import ImageFiles, StagedImage
from controller.images.inspect import inspect, inspect_split
from controller.images.servers import RemoteSource
from controller.operations.kinds import ReportProgress
from controller.records import Image
from controller.services.requests import ImageSource
from controller.services.shared_work import Hear, SharedWork
from controller.store import images as rows
from controller.store import operations as operation_rows
from controller.store.db import Database, Transaction

ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


class Resolved(Struct, frozen=True):
    """The image that a request means: stored (`fingerprint`), to be made by a builder (`source`), or of a server.

    `requested` is what the container's `image` field shows beside what it got.
    """

    fingerprint: str | None
    source: str | None
    properties: dict[str, str]
    architecture: str | None
    requested: dict[str, Any]
    remote: RemoteSource | None = None


def canonical_architecture(name: str) -> str:
    """The kernel's name of an architecture for Debian's."""
    return ARCHITECTURES.get(name, name)


class Images:
    """The images of the controller."""

    def __init__(
        self,
        store: Database,
        fleet: Fleet,
        files: ImageFiles,
        builders: Sequence[Builder],
        clock: Clock,
        ticket_key: bytes,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._files = files
        self._builders = builders
        self._clock = clock
        self._building: SharedWork[Image] = SharedWork()
        self._held: Counter[str] = Counter()
        """Fingerprints of uploads whose operations have not ended: how many there are."""
        self._ticket_key = ticket_key

    # ------------------------------------------------------------ finding

    def resolve(self, source: ImageSource) -> Resolved:
        """The image that a source means. Raises InvalidRequest or NotFound naming the field."""
        require_one_way(source)
        if source.fingerprint is not None:
            image = self.by_fingerprint(source.fingerprint, field="source.fingerprint")
            return _stored(image, {"fingerprint": source.fingerprint})
        if source.alias is not None:
            return _stored(self.by_alias(source.alias, field="source.alias"), {"alias": source.alias})
        return self._by_properties(source.properties or {})

    def by_fingerprint(self, prefix: str, field: str = "fingerprint", public: bool = False) -> Image:
        """The image whose fingerprint begins so. Raises NotFound, or InvalidRequest when there are several.

        `public`: for somebody who sees no other images than these.
        """
        found = [
            image
            for key, image in self._fleet.images.items()
            if key.startswith(prefix.lower()) and (image.public or not public)
        ]
        if not prefix or not found:
            raise NotFound(f"image {prefix[:64]!r} not found", field=field)
        if len(found) > 1:
            raise InvalidRequest(f"{len(found)} images begin with {prefix!r}", field=field, allowed="a unique prefix")
        return found[0]

    def path(self, fingerprint: str) -> Path:
        """Where an image's file is."""
        return self._files.path(fingerprint)

    def by_alias(self, alias: str, field: str = "alias") -> Image:
        """The image with this alias. Raises NotFound."""
        for image in self._fleet.images.values():
            if alias in image.aliases:
                return image
        raise NotFound(f"image alias {alias[:128]!r} not found", field=field)

    def _by_properties(self, properties: dict[str, str]) -> Resolved:
        if not properties:
            raise InvalidRequest(
                "the image's properties are empty", field="source.properties", allowed="os, release, architecture"
            )
        newest_first = sorted(self._fleet.images.values(), key=lambda image: image.created_at, reverse=True)
        for image in newest_first:
            if not image.source and not image.cached and _match(image.properties, properties):
                return _stored(image, dict(properties))
        builder = find_builder(self._builders, properties)
        key = builder.key(properties)
        made = next((image for image in newest_first if image.source == key), None)
        if made is not None:
            return _stored(made, dict(properties))
        architecture = properties.get("architecture")
        return Resolved(
            None, key, properties, canonical_architecture(architecture) if architecture else None, dict(properties)
        )

    # ------------------------------------------------------------ taking in

    async def obtain(self, source: str, properties: dict[str, str], report: ReportProgress) -> Image:
        """The image of a builder's key; several who want it wait for one build."""
        made = next((image for image in self._fleet.images.values() if image.source == source), None)
        if made is not None:
            return made
        return await self._building.do(
            source,
            lambda tell: self._build(source, properties, tell),
            lambda note: report(note["stage"], note.get("percent")),
        )

    async def _build(self, source: str, properties: dict[str, str], tell: Hear) -> Image:
        builder = find_builder(self._builders, properties)
        built = await builder.build(
            properties, self._files, lambda stage, percent: tell({"stage": stage, "percent": percent})
        )
        now, filename = timestamp(self._clock.now()), f"{source}.tar"[:255]
        size, fingerprint = built.staged.size, built.staged.fingerprint or (await built.staged.finish())[0]
        image = Image(fingerprint, built.layout, size, built.properties, (), source, filename, now)
        return await self.keep(built.staged, image)

    def stage(self, limit: int) -> StagedImage:
        """A file for an upload of at most `limit` bytes."""
        return self._files.stage(limit)

    async def hold(self, staged: StagedImage) -> str:
        """Make a complete upload durable for the operation that will take it in; returns its fingerprint.

        From then on it outlives a restart. Raises NoSpace.
        """
        fingerprint = staged.fingerprint or (await staged.finish())[0]
        self._held[fingerprint] += 1
        try:
            await self._files.keep(staged)
        except BaseException:
            self.let_go(fingerprint)
            raise
        return fingerprint

    def let_go(self, upload: str) -> None:
        """An upload's operation is over, or was not accepted: its file goes, unless it is an image's or still held."""
        self._held[upload] -= 1
        if self._held[upload] <= 0:
            del self._held[upload]
            if upload not in self._fleet.images:
                self._files.delete(upload)

    async def import_upload(
        self,
        upload: str,
        filename: str,
        aliases: tuple[str, ...],
        offset: int = 0,
        *,
        public: bool = False,
        expires_at: str | None = None,
    ) -> Image:
        """Make an image of an upload, if it is one; again is success. `offset`: where a split one's second file begins.

        Raises InvalidRequest, Conflict, Unavailable.
        """
        path = self._files.path(upload)
        if not path.exists():
            raise Unavailable("the upload was lost: send it again")
        try:
            image = await self._inspected(upload, path, filename, aliases, offset)
            image = msgspec.structs.replace(image, public=public, expires_at=expires_at)
            image = await self._store.write(lambda transaction: _add(transaction, image))
        except VzfleetError:
            self.let_go(upload)
            raise
        self.let_go(upload)
        return image

    async def _inspected(
        self, fingerprint: str, path: Path, filename: str, aliases: tuple[str, ...], offset: int
    ) -> Image:
        facts = await (inspect_split(path, offset) if offset else inspect(path))
        # metadata.yaml names the architecture outside its properties.
        properties = {"architecture": facts.architecture} if facts.architecture else {}
        properties |= facts.properties
        now = timestamp(self._clock.now())
        size = path.stat().st_size
        return Image(
            fingerprint, facts.layout, size, properties, aliases, "", filename[:255], now, rootfs_offset=offset
        )

    def check_aliases(self, aliases: tuple[str, ...]) -> None:
        """Raise InvalidRequest for a malformed alias, Conflict for one that another image has."""
        for alias in aliases:
            check_alias(alias)
            if any(alias in image.aliases for image in self._fleet.images.values()):
                raise Conflict(f"the alias {alias!r} belongs to another image", field="alias")

    async def keep(self, staged: StagedImage, image: Image) -> Image:
        """Make an image of a finished file. Raises NoSpace, Conflict."""
        # The same content may be there already, or be coming: its file is then replaced by itself.
        await self._files.keep(staged)
        try:
            return await self._store.write(lambda transaction: _add(transaction, image))
        except VzfleetError:
            if image.fingerprint not in self._fleet.images and not self._held[image.fingerprint]:
                self._files.delete(image.fingerprint)
            raise

    async def forget(self, fingerprint: str) -> None:
        """Remove an image's row and file; absent is success."""
        await self._store.write(lambda transaction: rows.rows.delete(transaction, fingerprint))
        self._files.delete(fingerprint)

    async def sweep(self) -> None:
        """Remove files whose rows a crash prevented, but for uploads that are about to be taken in. For the start."""
        waiting = await self._store.read(operation_rows.unfinished)
        uploads = {str(each.parameters["upload"]) for each in waiting if each.kind == "image.import"}
        uploads |= {str(each.outputs["pack"]["upload"]) for each in waiting if "pack" in each.outputs}
        self._files.sweep_unknown(self._fleet.images.keys() | uploads)

    # ------------------------------------------------------------ fetching by nodes

    def ticket(self, fingerprint: str, operation: str) -> str:
        """A token good for fetching one file for one operation, also when the controller restarts meanwhile."""
        mark = hmac.new(self._ticket_key, f"{operation}/{fingerprint}".encode(), hashlib.sha256).hexdigest()
        return f"{operation}.{mark}"

    def file_for(self, fingerprint: str, ticket: str) -> Path:
        """The file that a ticket opens. Raises Forbidden or NotFound."""
        operation, _, _ = ticket.partition(".")
        if not hmac.compare_digest(self.ticket(fingerprint, operation).encode(), ticket.encode()):
            raise Forbidden("this token does not open that image")
        if fingerprint not in self._fleet.images:
            raise NotFound(f"image {fingerprint[:12]} not found")
        return self._files.path(fingerprint)


def require_one_way(source: ImageSource) -> None:
    """Raise InvalidRequest unless a source names its image in exactly one way."""
    given = [name for name in ("properties", "alias", "fingerprint") if getattr(source, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            "an image source names its image in one way",
            field="source",
            allowed="one of properties, alias, fingerprint",
        )


def _add(transaction: Transaction, image: Image) -> Image:
    """Add an image, or its aliases and source to the one with the same content. Raises Conflict for an alias.

    One that was only cached stays from then on, unless the new one is cached, too.
    """
    present = None
    for other in rows.rows.all(transaction.connection):
        if other.fingerprint == image.fingerprint:
            present = other
        elif taken := set(other.aliases) & set(image.aliases):
            raise Conflict(f"the alias {min(taken)!r} belongs to another image", field="alias")
    if present is None:
        return rows.rows.insert(transaction, image)
    merged = msgspec.structs.replace(
        present,
        aliases=tuple(dict.fromkeys((*present.aliases, *image.aliases))),
        source=image.source or present.source,
        public=present.public or image.public,
    )
    if present.cached and not image.cached:
        merged = msgspec.structs.replace(merged, cached=False, expires_at=image.expires_at)
    return rows.rows.replace(transaction, merged)


def _stored(image: Image, requested: dict[str, Any]) -> Resolved:
    architecture = image.properties.get("architecture")
    return Resolved(
        image.fingerprint,
        None,
        image.properties,
        canonical_architecture(architecture) if architecture else None,
        {**requested, "fingerprint": image.fingerprint},
    )


def _match(has: dict[str, str], wanted: dict[str, str]) -> bool:
    def normal(name: str, value: str) -> str:
        return canonical_architecture(value.lower()) if name == "architecture" else value.lower()

    return all(name in has and normal(name, has[name]) == normal(name, value) for name, value in wanted.items())
