"""Aliases of images: names that stand in the row of the image which they mean, so that one means one image."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Struct

from common.errors import Conflict, NotFound
from common.names import check_alias
from controller.fleet import Fleet
from controller.records import Image
from controller.services.containers import check_description
from controller.services.images import Images
from controller.services.requests import AliasBody, AliasChangeBody
from controller.services.revisions import digest, require_match
from controller.store import images as rows
from controller.store.db import Database, Transaction


class Alias(Struct, frozen=True):
    """An alias; `target` is the fingerprint of its image."""

    name: str
    target: str
    description: str


def aliases_of(image: Image) -> list[Alias]:
    """An image's aliases."""
    return [Alias(name, image.fingerprint, image.descriptions.get(name, "")) for name in image.aliases]


def etag_of(alias: Alias) -> str:
    """A hash of what can be written of it, unquoted."""
    return digest(alias)


def with_alias(image: Image, name: str, description: str = "") -> Image:
    """The image with one more alias."""
    descriptions = {**image.descriptions, name: description} if description else image.descriptions
    return msgspec.structs.replace(image, aliases=(*image.aliases, name), descriptions=descriptions)


def without_alias(image: Image, name: str) -> Image:
    """The image without this alias."""
    aliases = tuple(alias for alias in image.aliases if alias != name)
    descriptions = {alias: text for alias, text in image.descriptions.items() if alias != name}
    return msgspec.structs.replace(image, aliases=aliases, descriptions=descriptions)


class Aliases:
    """The aliases of all images. Every change is one transaction."""

    def __init__(self, store: Database, fleet: Fleet, images: Images) -> None:
        self._store = store
        self._fleet = fleet
        self._images = images

    def all(self) -> list[Alias]:
        """All of them, by name."""
        found = [alias for image in self._fleet.images.values() for alias in aliases_of(image)]
        return sorted(found, key=lambda alias: alias.name)

    def get(self, name: str) -> Alias:
        """One alias. Raises NotFound."""
        for image in self._fleet.images.values():
            if name in image.aliases:
                return Alias(name, image.fingerprint, image.descriptions.get(name, ""))
        raise _missing()

    async def create(self, body: AliasBody) -> None:
        """Add one. Raises InvalidRequest, NotFound (no such image), Conflict (it exists)."""
        name = check_alias(body.name, "name")
        description = check_description(body.description)
        target = self._images.by_fingerprint(body.target, "target").fingerprint

        def write(transaction: Transaction) -> None:
            _refuse_taken(transaction, name)
            rows.rows.replace(transaction, with_alias(_image(transaction, target), name, description))

        await self._store.write(write)

    async def change(self, name: str, body: AliasChangeBody, expected: str | None) -> None:
        """Give it another target or description; what is UNSET stays. Raises NotFound, PreconditionFailed."""
        described = None if body.description is UNSET else check_description(body.description)
        target = None if body.target is UNSET else self._images.by_fingerprint(body.target, "target").fingerprint

        def write(transaction: Transaction) -> None:
            image = _holder(transaction, name)
            present = Alias(name, image.fingerprint, image.descriptions.get(name, ""))
            require_match(etag_of(present), expected, "alias")
            description = present.description if described is None else described
            without = without_alias(image, name)
            if target in (None, image.fingerprint):
                rows.rows.replace(transaction, with_alias(without, name, description))
            else:
                rows.rows.replace(transaction, without)
                rows.rows.replace(transaction, with_alias(_image(transaction, str(target)), name, description))

        await self._store.write(write)

    async def rename(self, name: str, new: str) -> None:
        """Give it another name. Raises InvalidRequest, NotFound, Conflict."""
        check_alias(new, "name")

        def write(transaction: Transaction) -> None:
            image = _holder(transaction, name)
            _refuse_taken(transaction, new)
            described = image.descriptions.get(name, "")
            rows.rows.replace(transaction, with_alias(without_alias(image, name), new, described))

        await self._store.write(write)

    async def delete(self, name: str) -> None:
        """Remove it; its image stays. Raises NotFound."""
        await self._store.write(
            lambda transaction: rows.rows.replace(transaction, without_alias(_holder(transaction, name), name))
        )


def _holder(transaction: Transaction, name: str) -> Image:
    for image in rows.rows.all(transaction.connection):
        if name in image.aliases:
            return image
    raise _missing()


def _image(transaction: Transaction, fingerprint: str) -> Image:
    image = rows.rows.get(transaction.connection, fingerprint)
    if image is None:
        raise NotFound("Image not found", field="target")
    return image


def _refuse_taken(transaction: Transaction, name: str) -> None:
    if any(name in image.aliases for image in rows.rows.all(transaction.connection)):
        raise Conflict(f'Alias "{name}" already exists', field="name")


def _missing() -> NotFound:
    return NotFound("Image alias not found", field="name")
