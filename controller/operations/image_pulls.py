"""Images from elsewhere: from an image server or a URL, and their newer versions.

Each is one step. A download that a restart of the controller interrupts begins again; a cancel leaves nothing of it.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from controller.images.servers import Keep, RemoteSource
from controller.operations.kinds import Context, Kind, Step
from controller.records import Operation
from controller.store.db import Transaction

PULL_TIME = 6 * 3600.0


class PullParameters(Struct, frozen=True):
    """An image to be had: of a server (`remote`), or what `url` leads to, whose sha256 is `fingerprint` if given."""

    keep: Keep
    remote: RemoteSource | None = None
    url: str = ""
    fingerprint: str = ""


class RefreshParameters(Struct, frozen=True):
    """An image whose newest version is to take its place."""

    fingerprint: str


async def _pull(context: Context) -> dict[str, Any]:
    wanted = context.parameters(PullParameters)
    if wanted.remote is None:
        image = await context.remote_images.pull_url(wanted.url, wanted.fingerprint, wanted.keep, context.show)
        return {"fingerprint": image.fingerprint, "size": image.size}
    got = await context.remote_images.pull(wanted.remote, wanted.keep, context.show)
    return {"fingerprint": got.image.fingerprint, "size": got.image.size, "serial": got.serial}


async def _refresh(context: Context) -> dict[str, Any]:
    before = context.parameters(RefreshParameters).fingerprint
    got = await context.remote_images.refresh(before, context.show)
    after = got.image.fingerprint
    return {"fingerprint": after, "serial": got.serial, "refreshed": after != before}


def _nothing(_transaction: Transaction, _operation: Operation) -> None:
    """Its rows are written by the step itself."""


PULL = Kind("image.pull", "Downloading image", (Step("pull", _pull),), PULL_TIME, _nothing, _nothing)
REFRESH = Kind("image.refresh", "Refreshing image", (Step("refresh", _refresh),), PULL_TIME, _nothing, _nothing)
