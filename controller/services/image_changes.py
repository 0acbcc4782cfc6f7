"""What can be written of an image: properties, who may see it, whether it follows its origin, when it is obsolete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

import msgspec
from msgspec import UNSET

from common.clock import Clock, timestamp
from common.errors import InvalidRequest, NotFound
from common.snapshots import given_expiry
from controller.images.metadata import check_properties
from controller.records import Image
from controller.services.images import Images
from controller.services.requests import ImageChangeBody, ImageUpdateBody
from controller.services.revisions import digest, require_match
from controller.store import images as rows
from controller.store.db import Database, Transaction


def etag_of(image: Image) -> str:
    """A hash of what can be written of it and of nothing else, unquoted."""
    return digest([image.public, image.auto_update, sorted(image.properties.items()), image.expires_at])


def expiry_of(moment: datetime | None) -> str | None:
    """An expiry as it is kept; None means never, as LXD's 0001-01-01T00:00:00Z does. Raises InvalidRequest."""
    given = given_expiry(moment)
    return None if given is None else timestamp(given)


def check_future(expires_at: str | None, now: datetime) -> None:
    """Raise InvalidRequest for an expiry that is no time to come."""
    if expires_at is not None and datetime.fromisoformat(expires_at) <= now:
        raise InvalidRequest(
            "an image cannot expire in the past", field="expires_at", allowed="a time to come, or null"
        )


class ImageChanges:
    """Changes of images that are there. Each is one transaction."""

    def __init__(self, store: Database, images: Images, clock: Clock) -> None:
        self._store = store
        self._images = images
        self._clock = clock

    async def update(self, fingerprint: str, body: ImageUpdateBody, expected: str | None) -> None:
        """Write all of it anew. Raises InvalidRequest, NotFound, PreconditionFailed."""
        properties = check_properties(body.properties, "properties")
        expires_at = expiry_of(body.expires_at)

        def changed(image: Image) -> Image:
            return msgspec.structs.replace(
                image,
                properties=properties,
                public=body.public,
                auto_update=body.auto_update,
                expires_at=expires_at,
            )

        await self._change(fingerprint, changed, expected)

    async def patch(self, fingerprint: str, body: ImageChangeBody, expected: str | None) -> None:
        """Write what is given; a property that is null is removed, others stay. Raises as `update`."""
        given = {} if body.properties is UNSET else body.properties
        check_properties({name: text for name, text in given.items() if text is not None}, "properties")
        expires_at = UNSET if body.expires_at is UNSET else expiry_of(body.expires_at)

        def changed(image: Image) -> Image:
            return msgspec.structs.replace(
                image,
                properties=check_properties(_merged(image.properties, given), "properties"),
                public=image.public if body.public is UNSET else body.public,
                auto_update=image.auto_update if body.auto_update is UNSET else body.auto_update,
                expires_at=image.expires_at if expires_at is UNSET else expires_at,
            )

        await self._change(fingerprint, changed, expected)

    async def _change(self, fingerprint: str, changed: Callable[[Image], Image], expected: str | None) -> None:
        whole = self._images.by_fingerprint(fingerprint).fingerprint

        def write(transaction: Transaction) -> None:
            image = rows.rows.get(transaction.connection, whole)
            if image is None:
                raise NotFound(f"image {whole[:12]} not found", field="fingerprint")
            require_match(etag_of(image), expected, "image")
            new = changed(image)
            if new.expires_at != image.expires_at:
                check_future(new.expires_at, self._clock.now())
            if new.auto_update and (new.origin is None or new.origin.protocol != "simplestreams"):
                text = "the image has not come from an image server"
                raise InvalidRequest(text, field="auto_update", allowed="false")
            if new != image:
                rows.rows.replace(transaction, new)

        await self._store.write(write)


def _merged(present: Mapping[str, str], given: Mapping[str, str | None]) -> dict[str, str]:
    merged = {**present, **given}
    return {name: text for name, text in merged.items() if text is not None}
