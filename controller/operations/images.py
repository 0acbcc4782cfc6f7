"""Taking in uploaded images, and deleting images everywhere."""

from __future__ import annotations

import logging
from typing import Any

from msgspec import Struct

from common.commands import DropImage
from common.errors import VzfleetError
from common.states import NodeStatus
from controller.operations.kinds import Context, Kind, Step
from controller.records import Operation
from controller.store.db import Transaction

log = logging.getLogger(__name__)


class ImportParameters(Struct, frozen=True):
    """An upload that is complete on the controller's disk."""

    upload: str
    filename: str
    aliases: tuple[str, ...]


class DeleteImageParameters(Struct, frozen=True):
    """An image to be forgotten."""

    fingerprint: str


async def _import(context: Context) -> dict[str, Any]:
    wanted = context.parameters(ImportParameters)
    context.report("inspecting", None)
    image = await context.resources.images.import_upload(wanted.upload, wanted.filename, wanted.aliases)
    return {"fingerprint": image.fingerprint, "size": image.size}


async def _drop(context: Context) -> dict[str, Any] | None:
    """Have the nodes that can be reached drop it; the others keep a copy which nothing uses."""
    fingerprint = context.parameters(DeleteImageParameters).fingerprint
    kept: dict[str, str] = {}
    for name, node in list(context.resources.fleet.nodes.items()):
        if node.images is None or fingerprint not in node.images or node.status is not NodeStatus.ONLINE:
            continue
        try:
            await context.command(name, DropImage(fingerprint), 0, part=f"-{name}")
            node.images.pop(fingerprint, None)
        except VzfleetError as error:
            kept[name] = error.text
    return {"kept": kept} if kept else None


async def _forget(context: Context) -> None:
    await context.resources.images.forget(context.parameters(DeleteImageParameters).fingerprint)


def _nothing(_transaction: Transaction, _operation: Operation) -> None:
    """Its rows are written by the step itself."""


IMPORT = Kind("image.import", "Importing image", (Step("import", _import),), 900, _nothing, _nothing)
DELETE = Kind(
    "image.delete",
    "Deleting image",
    (Step("forget", _forget), Step("drop", _drop)),
    900,
    _nothing,
    _nothing,
    no_return=0,
)
