"""/1.0/images and /1.0/images/<fingerprint>."""

from __future__ import annotations

from tornado.web import HTTPError, stream_request_body

from common.errors import InvalidRequest, TooLarge, VzfleetError
from controller.api.base import Handler
from controller.api.identity import Right
from controller.api.limits import declared_length, expect_stream, may_discard
from controller.api.views import image_view
from controller.images.files import StagedImage


@stream_request_body
class Images(Handler):
    """GET, and POST of a tarball (`application/octet-stream`), which is written to disk as it comes."""

    rights = {"GET": Right.READ, "POST": Right.OPERATE}
    parameters = ("recursion", "alias")
    streamed = True
    staged: StagedImage | None = None
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
        kind = self.request.headers.get("Content-Type", "application/octet-stream").partition(";")[0].strip()
        if kind.lower() != "application/octet-stream":
            raise InvalidRequest(
                "an image is uploaded as bytes", field="Content-Type", allowed="application/octet-stream"
            )
        limit = self.services.server.max_upload
        if declared_length(self.request.headers) > limit:
            raise TooLarge("the image is too large", field="body", allowed=f"at most {limit} bytes")
        self.services.images.check_aliases(self._aliases())
        expect_stream(self.request)
        self.staged = self.services.images.stage(limit)

    def _aliases(self) -> tuple[str, ...]:
        return tuple(self.get_query_arguments("alias"))

    async def data_received(self, chunk: bytes) -> None:
        if self.staged is None:
            return
        try:
            await self.staged.write(chunk)
        except VzfleetError as error:
            self._throw_away()
            self.refusal = error

    def get(self) -> None:
        images = sorted(self.services.fleet.images.values(), key=lambda image: image.fingerprint)
        if self.recursion() == 0:
            self.answer([f"/1.0/images/{image.fingerprint}" for image in images])
        else:
            self.answer([image_view(image) for image in images])

    async def post(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self.staged is None or self.staged.size == 0:
            raise InvalidRequest("the upload is empty", field="body", allowed="a tarball")
        fingerprint, _ = await self.staged.finish()
        if await self.replay(fingerprint.encode()):
            return
        staged, self.staged = self.staged, None
        filename = self.request.headers.get("X-LXD-filename", "") or "upload"
        operation = await self.services.image_operations.take_in(self.known, staged, filename, self._aliases())
        self.answer_operation(operation)

    def on_connection_close(self) -> None:
        self._throw_away()

    def on_finish(self) -> None:
        super().on_finish()
        self._throw_away()

    def _throw_away(self) -> None:
        if self.staged is not None:
            self.staged.discard()
            self.staged = None


class Image(Handler):
    """GET and DELETE; a unique prefix of the fingerprint will do."""

    rights = {"GET": Right.READ, "DELETE": Right.OPERATE}

    def get(self, fingerprint: str) -> None:
        self.answer(image_view(self.services.images.by_fingerprint(fingerprint)))

    async def delete(self, fingerprint: str) -> None:
        self.answer_operation(await self.services.image_operations.delete(self.known, fingerprint))


routes = [(r"/1\.0/images", Images), (r"/1\.0/images/([^/]+)", Image)]
