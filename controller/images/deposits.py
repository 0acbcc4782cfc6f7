"""Images that nodes make and send here: each operation that waits for one has a place for it, and a token."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import Cancelled, Forbidden
from controller.images.files import ImageFiles, StagedImage


@dataclass
class Place:
    """What has come for one operation: the file that is being written, and the last one that is whole."""

    coming: StagedImage | None = None
    whole: StagedImage | None = None

    def take(self) -> StagedImage | None:
        """The finished file, which is the caller's from now on; None when there is none."""
        taken, self.whole = self.whole, None
        return taken

    def clear(self) -> None:
        """Throw away what was not taken."""
        for staged in (self.coming, self.whole):
            if staged is not None:
                staged.discard()
        self.coming = self.whole = None


class Deposits:
    """Takes files of at most `limit` bytes. Nothing of them outlives the operation, or this process."""

    def __init__(self, files: ImageFiles, key: bytes, limit: int) -> None:
        self._files = files
        self._key = key
        self.limit = limit
        self._places: dict[str, Place] = {}

    def token(self, operation: str) -> str:
        """What lets a node send one operation's image, also when the controller restarts meanwhile."""
        return f"{operation}.{hmac.new(self._key, operation.encode(), hashlib.sha256).hexdigest()}"

    @contextmanager
    def expect(self, operation: str) -> Iterator[Place]:
        """Let an operation's image come within the block."""
        place = self._places[operation] = Place()
        try:
            yield place
        finally:
            del self._places[operation]
            place.clear()

    def begin(self, operation: str, token: str) -> StagedImage:
        """An empty file for an image that comes; one that is on its way already is given up. Raises Forbidden."""
        if not hmac.compare_digest(self.token(operation).encode(), token.encode()):
            raise Forbidden("this token does not belong to that operation")
        place = self._places.get(operation)
        if place is None:
            raise Forbidden("this token's operation waits for no image")
        if place.coming is not None:
            place.coming.discard()
        place.coming = self._files.stage(self.limit)
        return place.coming

    async def finish(self, operation: str, staged: StagedImage) -> str:
        """The file is whole: its fingerprint. Raises NoSpace, Cancelled when nobody waits for it any more."""
        fingerprint, _ = await staged.finish()
        place = self._places.get(operation)
        if place is None or place.coming is not staged:
            raise Cancelled("nobody waits for this image any more")
        if place.whole is not None:
            place.whole.discard()
        place.coming, place.whole = None, staged
        return fingerprint
