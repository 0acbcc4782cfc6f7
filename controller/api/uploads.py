"""An image that is uploaded: written to disk as it comes, as one tarball or as LXD's two."""

from __future__ import annotations

from common.errors import InvalidRequest, TooLarge
from controller.api.multipart import Multipart, Part
from controller.images.files import StagedImage

OVERHEAD = 64 * 1024
"""Bytes of a body in parts which are not of the parts themselves."""
PARTS = ("metadata", "rootfs")


class Upload:
    """One tarball: the body as it is. `offset` says where the second file of a split image begins."""

    def __init__(self, staged: StagedImage) -> None:
        self.staged = staged
        self.offset = 0
        self.filename = ""

    async def write(self, chunk: bytes) -> None:
        """Take a piece of the body. Raises TooLarge, NoSpace, InvalidRequest."""
        await self.staged.write(chunk)

    async def finish(self) -> str:
        """The body is complete: its sha256. Raises InvalidRequest, NoSpace."""
        if self.staged.size == 0:
            raise InvalidRequest("the upload is empty", field="body", allowed="a tarball")
        fingerprint, _ = await self.staged.finish()
        return fingerprint

    def discard(self) -> None:
        """Throw it away, unless somebody has taken its file over."""
        self.staged.discard()


class SplitUpload(Upload):
    """Two tarballs in a body of two parts, `metadata` and then `rootfs`, as LXD's clients send them."""

    def __init__(self, staged: StagedImage, boundary: bytes, limit: int) -> None:
        super().__init__(staged)
        self._parts: list[str] = []
        self._reader = Multipart(boundary)
        self._left = limit + OVERHEAD

    async def write(self, chunk: bytes) -> None:
        self._left -= len(chunk)
        if self._left < 0:
            raise TooLarge("the image is too large", field="body")
        for piece in self._reader.feed(chunk):
            if isinstance(piece, Part):
                self._begin(piece)
            else:
                await self.staged.write(piece)

    def _begin(self, part: Part) -> None:
        if len(self._parts) == len(PARTS) or part.name != PARTS[len(self._parts)]:
            raise InvalidRequest(
                f"unexpected part {part.name[:80]!r} of the body", field="body", allowed="metadata, then rootfs"
            )
        self._parts.append(part.name)
        self.offset, self.filename = self.staged.size, part.filename

    async def finish(self) -> str:
        if not self._reader.complete or len(self._parts) != len(PARTS):
            raise InvalidRequest("the body has not both parts", field="body", allowed="metadata, then rootfs")
        if not 0 < self.offset < self.staged.size:
            raise InvalidRequest("a part of the body is empty", field="body", allowed="two tarballs")
        return await super().finish()
