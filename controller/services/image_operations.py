"""Accepting what changes images: uploads and deletions."""

from __future__ import annotations

from controller.images.files import StagedImage
from controller.operations.images import DeleteImageParameters, ImportParameters
from controller.records import Operation
from controller.services.caller import Caller
from controller.services.images import Images
from controller.services.operations import Operations


class ImageOperations:
    """Operations on images."""

    def __init__(self, images: Images, operations: Operations) -> None:
        self._images = images
        self._operations = operations

    async def take_in(
        self, caller: Caller, staged: StagedImage, filename: str, aliases: tuple[str, ...], offset: int = 0
    ) -> Operation:
        """Accept a complete upload as an image; a split one's second file begins at `offset`.

        Raises InvalidRequest or Conflict for an alias, NoSpace.
        """
        self._images.check_aliases(aliases)
        upload = await self._images.hold(staged)
        parameters = ImportParameters(upload, filename[:255], aliases, offset)
        draft = self._operations.draft(
            caller, "image.import", containers=(), node=None, parameters=parameters, resources={"images": []}
        )
        try:
            return await self._operations.accept(lambda _: draft)
        except BaseException:
            self._images.let_go(upload)
            raise

    async def delete(self, caller: Caller, fingerprint: str) -> Operation:
        """Accept a deletion, here and on the nodes; containers made from it stay. Raises NotFound."""
        image = self._images.by_fingerprint(fingerprint)
        draft = self._operations.draft(
            caller,
            "image.delete",
            containers=(),
            node=None,
            parameters=DeleteImageParameters(image.fingerprint),
            resources={"images": [f"/1.0/images/{image.fingerprint}"]},
        )
        return await self._operations.accept(lambda _: draft)
