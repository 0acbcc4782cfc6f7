"""What of the fleet is not as the rows say: containers that have drifted, and those of nobody's."""

from __future__ import annotations

from common.reports import ContainerReport
from common.states import Status
from controller import drift
from controller.drift import Drift
from controller.fleet import Fleet
from controller.live import LiveContainer, LiveNode
from controller.records import Phase


def can_tell(fleet: Fleet, live: LiveContainer) -> bool:
    """Whether its node can be reached and has told what it has, while no operation works on the container."""
    node = fleet.nodes.get(live.record.node)
    idle = live.record.phase is Phase.READY and live.record.operation is None
    return idle and node is not None and node.reachable and node.images is not None


def drift_of(fleet: Fleet, live: LiveContainer) -> tuple[Drift, ...]:
    """By what a container differs from its row; nothing while that cannot be told."""
    if live.drift is None:
        there = can_tell(fleet, live)
        found = drift.find(live.record, live.report, live.snapshots, _elsewhere(fleet, live)) if there else ()
        live.drift = found
    return live.drift


def _elsewhere(fleet: Fleet, live: LiveContainer) -> str | None:
    """Another node on which an older generation of it runs."""
    record = live.record
    for name, node in fleet.nodes.items():
        if name == record.node or record.id not in node.unclaimed:
            continue
        report = node.unclaimed[record.id].report
        if 0 < report.generation < record.generation and report.status in (Status.RUNNING, Status.FROZEN):
            return name
    return None


def drifted(fleet: Fleet, node: LiveNode) -> list[str]:
    """The containers of a node that have drifted, by id."""
    return [id for id in sorted(node.containers) if drift_of(fleet, fleet.containers[id])]


def unmanaged(fleet: Fleet, node: LiveNode) -> list[ContainerReport]:
    """The containers of nobody's on a node, by id; without those that an operation is about to claim."""
    return [
        unclaimed.report
        for id, unclaimed in sorted(node.unclaimed.items())
        if not unclaimed.expected and not _is_claimed(fleet, node, unclaimed.report)
    ]


def _is_claimed(fleet: Fleet, node: LiveNode, report: ContainerReport) -> bool:
    """Whether the operation that works on the row of its id adopts it, or has just made it by a move."""
    live = fleet.containers.get(report.id)
    if live is None or live.record.operation is None:
        return False
    adopted = live.record.phase is Phase.CREATING and live.record.node == node.record.name
    return adopted or report.generation > live.record.generation
