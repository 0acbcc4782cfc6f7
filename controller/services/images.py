"""Images: which one a request means, building what is missing, taking in uploads, tokens for fetching files."""

from __future__ import annotations

import asyncio
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
from controller.images.inspect import inspect
from controller.operations.kinds import ReportProgress
from controller.records import Image
from controller.services.requests import ImageSource
from controller.store import images as rows
from controller.store import operations as operation_rows
from controller.store.db import Database, Transaction

ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


class Resolved(Struct, frozen=True):
    """The image that a request means: stored (`fingerprint`), or to be made by a builder (`source`).

    `requested` is what the container's `image` field shows beside what it got.
    """

    fingerprint: str | None
    source: str | None
    properties: dict[str, str]
    architecture: str | None
    requested: dict[str, Any]


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
        self._building: dict[str, asyncio.Task[Image]] = {}
        self._listeners: dict[str, list[ReportProgress]] = {}
        self._held: Counter[str] = Counter()
        """Fingerprints of uploads whose operations have not ended: how many there are."""
        self._ticket_key = ticket_key

    # ------------------------------------------------------------ finding

    def resolve(self, source: ImageSource) -> Resolved:
        """The image that a source means. Raises InvalidRequest or NotFound naming the field."""
        given = [name for name in ("properties", "alias", "fingerprint") if getattr(source, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                "an image source names its image in one way",
                field="source",
                allowed="one of properties, alias, fingerprint",
            )
        if source.fingerprint is not None:
            image = self.by_fingerprint(source.fingerprint, field="source.fingerprint")
            return _stored(image, {"fingerprint": source.fingerprint})
        if source.alias is not None:
            return _stored(self.by_alias(source.alias, field="source.alias"), {"alias": source.alias})
        return self._by_properties(source.properties or {})

    def by_fingerprint(self, prefix: str, field: str = "fingerprint") -> Image:
        """The image whose fingerprint begins so. Raises NotFound, or InvalidRequest when there are several."""
        found = [image for key, image in self._fleet.images.items() if key.startswith(prefix.lower())]
        if not prefix or not found:
            raise NotFound(f"image {prefix[:64]!r} not found", field=field)
        if len(found) > 1:
            raise InvalidRequest(f"{len(found)} images begin with {prefix!r}", field=field, allowed="a unique prefix")
        return found[0]

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
            if not image.source and _match(image.properties, properties):
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
        listeners = self._listeners.setdefault(source, [])
        task = self._building.get(source)
        if task is None:
            task = asyncio.ensure_future(self._build(source, properties, lambda *far: _tell(listeners, *far)))
            self._building[source] = task
            task.add_done_callback(lambda _: self._forget_build(source))
        listeners.append(report)
        try:
            # Who gives up waiting does not take the image away from the others.
            return await asyncio.shield(task)
        finally:
            listeners.remove(report)

    def _forget_build(self, source: str) -> None:
        del self._building[source], self._listeners[source]

    async def _build(self, source: str, properties: dict[str, str], report: ReportProgress) -> Image:
        builder = find_builder(self._builders, properties)
        built = await builder.build(properties, self._files, report)
        return await self._keep(built.staged, built.layout, built.properties, source)

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

    async def import_upload(self, upload: str, filename: str, aliases: tuple[str, ...]) -> Image:
        """Make an image of an upload, if it is one; again is success. Raises InvalidRequest, Conflict, Unavailable."""
        path = self._files.path(upload)
        if not path.exists():
            raise Unavailable("the upload was lost: send it again")
        try:
            image = await self._import(upload, path, filename, aliases)
        except VzfleetError:
            self.let_go(upload)
            raise
        self.let_go(upload)
        return image

    async def _import(self, fingerprint: str, path: Path, filename: str, aliases: tuple[str, ...]) -> Image:
        facts = await inspect(path)
        # metadata.yaml names the architecture outside its properties.
        properties = {"architecture": facts.architecture} if facts.architecture else {}
        properties |= facts.properties
        now = timestamp(self._clock.now())
        size = path.stat().st_size
        image = Image(fingerprint, facts.layout, size, properties, aliases, "", filename[:255], now)
        return await self._store.write(lambda transaction: _add(transaction, image))

    def check_aliases(self, aliases: tuple[str, ...]) -> None:
        """Raise InvalidRequest for a malformed alias, Conflict for one that another image has."""
        for alias in aliases:
            check_alias(alias)
            if any(alias in image.aliases for image in self._fleet.images.values()):
                raise Conflict(f"the alias {alias!r} belongs to another image", field="alias")

    async def _keep(self, staged: StagedImage, layout: str, properties: dict[str, str], source: str) -> Image:
        fingerprint = staged.fingerprint or (await staged.finish())[0]
        # The same content may be there already, or be coming: its file is then replaced by itself.
        await self._files.keep(staged)
        now = timestamp(self._clock.now())
        image = Image(fingerprint, layout, staged.size, properties, (), source, f"{source}.tar"[:255], now)
        try:
            return await self._store.write(lambda transaction: _add(transaction, image))
        except VzfleetError:
            if fingerprint not in self._fleet.images and not self._held[fingerprint]:
                self._files.delete(fingerprint)
            raise

    async def forget(self, fingerprint: str) -> None:
        """Remove an image's row and file; absent is success."""
        await self._store.write(lambda transaction: rows.rows.delete(transaction, fingerprint))
        self._files.delete(fingerprint)

    async def sweep(self) -> None:
        """Remove files whose rows a crash prevented, but for uploads that are about to be taken in. For the start."""
        waiting = await self._store.read(operation_rows.unfinished)
        uploads = {str(each.parameters["upload"]) for each in waiting if each.kind == "image.import"}
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


def _tell(listeners: list[ReportProgress], stage: str, percent: int | None) -> None:
    for listener in listeners:
        listener(stage, percent)


def _add(transaction: Transaction, image: Image) -> Image:
    """Add an image, or its aliases and source to the one with the same content. Raises Conflict for an alias."""
    present = None
    for other in rows.rows.all(transaction.connection):
        if other.fingerprint == image.fingerprint:
            present = other
        elif taken := set(other.aliases) & set(image.aliases):
            raise Conflict(f"the alias {min(taken)!r} belongs to another image", field="alias")
    if present is None:
        return rows.rows.insert(transaction, image)
    aliases = tuple(dict.fromkeys((*present.aliases, *image.aliases)))
    source = image.source or present.source
    return rows.rows.replace(transaction, msgspec.structs.replace(present, aliases=aliases, source=source))


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
