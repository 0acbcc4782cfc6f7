"""Publishing a container, or its snapshot, as an image: its node packs it, and sends the file here as it packs.

A file on its way does not outlive the controller. When the node has sent one to an earlier life of the controller, it
is told to pack anew.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from msgspec import Struct

from common.commands import PublishContainer
from common.errors import Unavailable
from controller.images.servers import Keep
from controller.operations.kinds import Context, Kind, Step
from controller.store import containers as rows

PUBLISH_TIME = 3600.0
TRIES = 16
"""How many times a node is told to pack, when what it has sent is lost each time."""


class PublishParameters(Struct, frozen=True):
    """What is to be an image, and what is said of it; `force`: as it is at one moment if it runs."""

    container: str
    node: str
    generation: int
    snapshot: str | None
    force: bool
    compression: str
    architecture: str
    keep: Keep


async def _pack(context: Context) -> dict[str, Any]:
    wanted = context.parameters(PublishParameters)
    deposits, identity = context.deposits, context.operation.id
    command = PublishContainer(
        container=wanted.container,
        path=f"/1.0/internal/publications/{identity}",
        token=deposits.token(identity),
        compression=wanted.compression,
        architecture=wanted.architecture,
        created_at=int(datetime.fromisoformat(context.operation.created_at).timestamp()),
        limit=deposits.limit,
        properties=wanted.keep.properties,
        snapshot=wanted.snapshot,
        force=wanted.force,
    )
    with deposits.expect(identity) as place:
        for attempt in range(TRIES):
            part = f"~{attempt + 1}" if attempt else ""
            await context.command(wanted.node, command, wanted.generation, part)
            if (staged := place.take()) is not None:
                return {"upload": await context.resources.images.hold(staged)}
    raise Unavailable(f"node {wanted.node} has sent the image, and it is not here")


async def _import(context: Context) -> dict[str, Any]:
    wanted = context.parameters(PublishParameters)
    context.report("inspecting", None)
    upload, keep = context.operation.outputs["pack"]["upload"], wanted.keep
    image = await context.resources.images.import_upload(
        upload, keep.filename, keep.aliases, public=keep.public, expires_at=keep.expires_at
    )
    return {"fingerprint": image.fingerprint, "size": image.size}


PUBLISH = Kind(
    "image.publish",
    "Publishing image",
    # A file that is no image, or whose alias was taken meanwhile, is thrown away by the import itself.
    (Step("pack", _pack), Step("import", _import)),
    PUBLISH_TIME,
    rows.release,
    rows.release,
    no_return=1,
)
