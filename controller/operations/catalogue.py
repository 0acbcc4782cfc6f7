"""All kinds of operations."""

from __future__ import annotations

from controller.operations import (
    adoptions,
    containers,
    copies,
    image_publishing,
    image_pulls,
    images,
    moves,
    nodes,
    recoveries,
    snapshots,
    states,
)
from controller.operations.kinds import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        containers.CREATE,
        containers.UPDATE,
        containers.RENAME,
        containers.DELETE,
        states.START,
        states.STOP,
        states.RESTART,
        states.FREEZE,
        states.UNFREEZE,
        snapshots.CREATE,
        snapshots.DELETE,
        snapshots.RENAME,
        snapshots.UPDATE,
        snapshots.RESTORE,
        copies.COPY,
        copies.REFRESH,
        moves.MOVE,
        recoveries.FROM_IMAGE,
        recoveries.FROM_COPY,
        adoptions.ADOPT,
        nodes.DRAIN,
        nodes.RESTORE,
        images.IMPORT,
        image_pulls.PULL,
        image_pulls.REFRESH,
        image_publishing.PUBLISH,
        images.DELETE,
    )
}
