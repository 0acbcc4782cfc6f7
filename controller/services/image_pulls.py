"""Accepting what brings images from elsewhere, and what makes them go when they are not needed any more."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import Busy, Forbidden, InvalidRequest, NotFound
from common.names import check_fingerprint
from controller.images.https import check_url
from controller.images.metadata import check_properties
from controller.images.servers import Keep
from controller.operations.image_pulls import PullParameters, RefreshParameters
from controller.operations.images import DeleteImageParameters
from controller.records import Image, Operation
from controller.services.caller import Caller
from controller.services.containers import check_description
from controller.services.image_bodies import ImageBody
from controller.services.image_changes import expiry_of
from controller.services.image_sources import ImageSources
from controller.services.images import Images
from controller.services.operations import Operations
from controller.services.remotes import Remotes
from controller.services.requests import ImageSource
from controller.store import images as rows
from controller.store import operations as operation_rows
from controller.store.db import Transaction


class ImagePulls:
    """Operations that fetch images, and the deletion of those that nobody needs."""

    def __init__(self, images: Images, sources: ImageSources, remotes: Remotes, operations: Operations) -> None:
        self._images = images
        self._sources = sources
        self._remotes = remotes
        self._operations = operations

    async def pull(self, caller: Caller, body: ImageBody) -> Operation:
        """Accept a download. Raises InvalidRequest, NotFound, Forbidden (another server or URL), Conflict (alias)."""
        if body.source.type == "url":
            parameters = self._of_url(caller, body)
        elif body.source.type == "image":
            parameters = self._of_server(caller, body)
        else:
            raise InvalidRequest(
                f"no image comes from {body.source.type[:40]!r}",
                field="source.type",
                allowed="url, image, container, instance or snapshot",
            )
        draft = self._operations.draft(
            caller, "image.pull", containers=(), node=None, parameters=parameters, resources={"images": []}
        )
        return await self._operations.accept(lambda _: draft)

    def keep(self, body: ImageBody) -> Keep:
        """What is said of an image. Raises InvalidRequest, Conflict for an alias."""
        names = [each.name for each in body.aliases or ()] + ([body.alias] if body.alias else [])
        aliases = tuple(dict.fromkeys(names))
        self._images.check_aliases(aliases)
        properties = check_properties(body.properties or {}, "properties")
        expires = expiry_of(body.expires_at)
        described = {each.name: check_description(each.description) for each in body.aliases or () if each.description}
        return Keep(aliases, properties, body.public, body.auto_update, expires, body.filename[:255], described)

    def _of_url(self, caller: Caller, body: ImageBody) -> PullParameters:
        if caller.role != "admin":
            # The controller sees networks that its callers do not.
            raise Forbidden("only an administrator may have the controller fetch a URL", allowed="admin")
        if body.auto_update:
            raise InvalidRequest("a URL has no newer versions", field="auto_update", allowed="false")
        url, expected = check_url(body.source.url), body.source.fingerprint
        if expected:
            check_fingerprint(expected, "source.fingerprint")
        return PullParameters(self.keep(body), url=url, fingerprint=expected)

    def _of_server(self, caller: Caller, body: ImageBody) -> PullParameters:
        given = body.source
        for name, value, allowed in (("protocol", given.protocol, "simplestreams"), ("mode", given.mode, "pull")):
            if value not in ("", allowed):
                raise InvalidRequest(f"unknown {name} {value[:40]!r}", field=f"source.{name}", allowed=allowed)
        server, alias = given.server, given.alias
        if not server and ":" in alias:
            server, _, alias = alias.partition(":")
        if not server or bool(alias) is bool(given.fingerprint):
            raise InvalidRequest(
                "an image of a server is named by the server, and its alias or fingerprint",
                field="source" if server else "source.server",
                allowed="server, and one of alias, fingerprint",
            )
        source = ImageSource(alias=alias or None, fingerprint=given.fingerprint or None, server=server)
        remote = self._sources.remote(source, caller)
        self._sources.expect(remote)
        return PullParameters(self.keep(body), remote)

    async def refresh(self, caller: Caller, fingerprint: str) -> Operation:
        """Accept a search for a newer version. Raises NotFound, Conflict when the image is of no image server."""
        image = self._images.by_fingerprint(fingerprint)
        self._remotes.origin_of(image)
        draft = self._operations.draft(
            caller,
            "image.refresh",
            containers=(),
            node=None,
            parameters=RefreshParameters(image.fingerprint),
            resources={"images": [f"/1.0/images/{image.fingerprint}"]},
        )
        return await self._operations.accept(lambda _: draft)

    async def expire(self, caller: Caller, fingerprint: str, still: Callable[[Image], bool]) -> Operation:
        """Accept the deletion of an image that `still` is to go. Raises NotFound when it is not, Busy in use."""
        draft = self._operations.draft(
            caller,
            "image.delete",
            containers=(),
            node=None,
            parameters=DeleteImageParameters(fingerprint),
            resources={"images": [f"/1.0/images/{fingerprint}"]},
        )

        def prepare(transaction: Transaction) -> Operation:
            image = rows.rows.get(transaction.connection, fingerprint)
            if image is None or not still(image):
                raise NotFound(f"image {fingerprint[:12]} does not expire")
            for operation in operation_rows.unfinished(transaction.connection):
                if _uses(operation, fingerprint):
                    raise Busy(
                        f"operation {operation.id} uses image {fingerprint[:12]}",
                        details={"operation": f"/1.0/operations/{operation.id}"},
                    )
            return draft

        return await self._operations.accept(prepare)


def _uses(operation: Operation, fingerprint: str) -> bool:
    got = operation.outputs.get("image")
    return operation.parameters.get("fingerprint") == fingerprint or (
        isinstance(got, dict) and got.get("fingerprint") == fingerprint
    )
