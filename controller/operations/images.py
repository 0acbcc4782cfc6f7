"""Taking in uploaded images, and deleting images everywhere."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import Struct

from common.commands import DropImage
from common.errors import VzfleetError
from controller.operations.kinds import Context, Kind, Step
from controller.records import Operation
from controller.store.db import Transaction

REACH_TIME = 15.0
"""Seconds within which a node must have dropped an image; it may only be connecting yet."""


class ImportParameters(Struct, frozen=True):
    """An upload that is complete on the controller's disk; `upload` is its fingerprint."""

    upload: str
    filename: str
    aliases: tuple[str, ...]
    offset: int = 0


class DeleteImageParameters(Struct, frozen=True):
    """An image to be forgotten."""

    fingerprint: str


async def _import(context: Context) -> dict[str, Any]:
    wanted = context.parameters(ImportParameters)
    context.report("inspecting", None)
    image = await context.resources.images.import_upload(wanted.upload, wanted.filename, wanted.aliases, wanted.offset)
    return {"fingerprint": image.fingerprint, "size": image.size}


async def _drop(context: Context) -> dict[str, Any] | None:
    """Have the nodes drop it, all at once; one that cannot be reached soon keeps a copy which nothing uses."""
    fingerprint = context.parameters(DeleteImageParameters).fingerprint
    # Right after a restart no node is in reach yet, nor is it known what each has.
    nodes = [
        name
        for name, node in context.resources.fleet.nodes.items()
        if node.images is None or fingerprint in node.images
    ]
    ends = await asyncio.gather(*(_drop_from(context, name, fingerprint) for name in nodes))
    kept = {name: why for name, why in zip(nodes, ends, strict=True) if why is not None}
    return {"kept": kept} if kept else None


async def _drop_from(context: Context, name: str, fingerprint: str) -> str | None:
    """Why a node keeps an image; None when it is gone there."""
    try:
        async with asyncio.timeout(REACH_TIME):
            await context.command(name, DropImage(fingerprint), 0, part=f"-{name}")
    except TimeoutError:
        return f"node {name} cannot be reached"
    except VzfleetError as error:
        return error.text
    node = context.resources.fleet.nodes.get(name)
    if node is not None and node.images is not None:
        node.images.pop(fingerprint, None)
    return None


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
