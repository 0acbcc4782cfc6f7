"""/1.0/images and /1.0/images/<fingerprint>."""

from __future__ import annotations

from tornado.web import HTTPError, stream_request_body

from common.errors import InvalidRequest, TooLarge, VzfleetError
from controller.api.base import Handler
from controller.api.bodies import decode
from controller.api.identity import Right
from controller.api.limits import MAX_BODY, declared_length, expect_stream, may_discard
from controller.api.multipart import boundary_of
from controller.api.public import caller_or_anyone, image_for
from controller.api.uploads import SplitUpload, Upload
from controller.services.image_bodies import ImageBody
from controller.services.image_changes import etag_of
from controller.services.publications import TYPES
from controller.services.requests import ImageChangeBody, ImageUpdateBody

TARBALL, PARTS, JSON = "application/octet-stream", "multipart/form-data", "application/json"


@stream_request_body
class Images(Handler):
    """GET, to anyone of the public ones; `alias` chooses those with one of these names.

    POST of what an image is to be made from (JSON), of a tarball, or of LXD's two (multipart). These are
    written to disk as they come.
    """

    rights = {"GET": Right.PUBLIC, "POST": Right.OPERATE}
    parameters = ("recursion", "alias")
    streamed = True
    upload: Upload | None = None
    written: bytearray | None = None
    refusal: VzfleetError | HTTPError | None = None

    async def prepare(self) -> None:
        try:
            await super().prepare()
            if self.request.method == "POST":
                self._begin()
        except (VzfleetError, HTTPError) as error:
            # A connection that is closed while its caller still sends is reset, and the answer lost: read on first.
            if self.request.method != "POST" or not may_discard(self.request):
                raise
            self.refusal = error

    def _begin(self) -> None:
        content_type = self.request.headers.get("Content-Type", TARBALL)
        kind = content_type.partition(";")[0].strip().lower()
        if kind == JSON:
            if declared_length(self.request.headers) > MAX_BODY:
                raise TooLarge("the body is too large", field="body", allowed=f"at most {MAX_BODY} bytes")
            may_discard(self.request)
            self.written = bytearray()
            return
        if kind not in (TARBALL, PARTS):
            raise InvalidRequest(
                "an image comes in another way", field="Content-Type", allowed=f"{JSON}, {TARBALL} or {PARTS}"
            )
        limit = self.services.server.max_upload
        if declared_length(self.request.headers) > limit:
            raise TooLarge("the image is too large", field="body", allowed=f"at most {limit} bytes")
        self.services.images.check_aliases(self._aliases())
        boundary = boundary_of(content_type) if kind == PARTS else None
        expect_stream(self.request)
        staged = self.services.images.stage(limit)
        self.upload = Upload(staged) if boundary is None else SplitUpload(staged, boundary, limit)

    def _aliases(self) -> tuple[str, ...]:
        return tuple(self.get_query_arguments("alias"))

    async def data_received(self, chunk: bytes) -> None:
        if self.written is not None and len(self.written) <= MAX_BODY:
            self.written += chunk
        if self.upload is None:
            return
        try:
            await self.upload.write(chunk)
        except VzfleetError as error:
            self._throw_away()
            self.refusal = error

    def get(self) -> None:
        caller, aliases = caller_or_anyone(self), set(self._aliases())
        images = [
            image
            for _, image in sorted(self.services.fleet.images.items())
            if (caller is not None or image.public) and (not aliases or aliases & set(image.aliases))
        ]
        if self.recursion() == 0:
            self.answer([f"/1.0/images/{image.fingerprint}" for image in images])
        else:
            self.answer([image_for(caller, image) for image in images])

    async def post(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self.upload is None:
            await self._get_from_elsewhere(bytes(self.written or b""))
            return
        fingerprint = await self.upload.finish()
        if await self.replay(fingerprint.encode()):
            return
        upload, self.upload = self.upload, None
        filename = self.request.headers.get("X-LXD-filename", "") or upload.filename or "upload"
        operation = await self.services.image_operations.take_in(
            self.known, upload.staged, filename, self._aliases(), upload.offset
        )
        self.answer_operation(operation)

    async def _get_from_elsewhere(self, content: bytes) -> None:
        if len(content) > MAX_BODY:
            raise TooLarge("the body is too large", field="body", allowed=f"at most {MAX_BODY} bytes")
        body = decode(content, ImageBody)
        if not await self.replay(content):
            service = self.services
            work = service.publications.publish if body.source.type in TYPES else service.image_pulls.pull
            self.answer_operation(await work(self.known, body))

    def on_connection_close(self) -> None:
        self._throw_away()

    def on_finish(self) -> None:
        super().on_finish()
        self._throw_away()

    def _throw_away(self) -> None:
        if self.upload is not None:
            self.upload.discard()
            self.upload = None


class Image(Handler):
    """GET (of a public one by anyone), PUT, PATCH and DELETE; a unique prefix of the fingerprint will do."""

    rights = {"GET": Right.PUBLIC, "PUT": Right.OPERATE, "PATCH": Right.OPERATE, "DELETE": Right.OPERATE}

    def get(self, fingerprint: str) -> None:
        caller = caller_or_anyone(self)
        image = self.services.images.by_fingerprint(fingerprint, public=caller is None)
        # Serves If-Match only: what cannot be written may change without it, so it must never make a 304 of one.
        self.set_header("ETag", f'"{etag_of(image)}"')
        self.answer(image_for(caller, image))

    async def put(self, fingerprint: str) -> None:
        body, expected = self.body(ImageUpdateBody), self.request.headers.get("If-Match")
        await self.services.image_changes.update(fingerprint, body, expected)
        await self.answer_write({})

    async def patch(self, fingerprint: str) -> None:
        body, expected = self.body(ImageChangeBody), self.request.headers.get("If-Match")
        await self.services.image_changes.patch(fingerprint, body, expected)
        await self.answer_write({})

    async def delete(self, fingerprint: str) -> None:
        self.answer_operation(await self.services.image_operations.delete(self.known, fingerprint))


class Refresh(Handler):
    """POST: have the newest version of an image take its place."""

    rights = {"POST": Right.OPERATE}

    async def post(self, fingerprint: str) -> None:
        self.answer_operation(await self.services.image_pulls.refresh(self.known, fingerprint))


routes = [
    (r"/1\.0/images", Images),
    (r"/1\.0/images/([^/]+)", Image),
    (r"/1\.0/images/([^/]+)/refresh", Refresh),
]
