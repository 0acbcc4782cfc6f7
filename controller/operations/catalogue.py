"""All kinds of operations."""

from __future__ import annotations

from controller.operations import adoptions, containers, copies, images, moves, nodes, recoveries, snapshots, states
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
        snapshots.RESTORE,
        copies.COPY,
        moves.MOVE,
        recoveries.FROM_IMAGE,
        recoveries.FROM_COPY,
        adoptions.ADOPT,
        nodes.DRAIN,
        nodes.RESTORE,
        images.IMPORT,
        images.DELETE,
    )
}
