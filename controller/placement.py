"""Which node gets a new container: a pure function of facts and request, with the reasons of every node.

A limit counts as reserved in full, a container without one by its present use.
"""

from __future__ import annotations

from msgspec import Struct

from common.states import NodeStatus
from common.units import format_size

TAKES_CONTAINERS = (NodeStatus.ONLINE, NodeStatus.SUSPECT)


class NodeState(Struct, frozen=True):
    """What placement knows of a node. Bytes; `peers` counts containers there with the same hostname prefix.

    `reserved_*` is what limits reserve and what containers without one use; `taken` says that a container of nobody's
    has the wanted id there.
    """

    name: str
    status: NodeStatus
    architecture: str
    cpus: int
    memory: int
    memory_free: int
    disk: int
    disk_free: int
    disk_limits: bool
    containers: int = 0
    reserved_memory: int = 0
    reserved_disk: int = 0
    peers: int = 0
    taken: bool = False


class Wanted(Struct, frozen=True):
    """What a container asks for. None is "no limit"; `node` pins it; `memory_share` is a percentage of the node's."""

    node: str | None = None
    architecture: str | None = None
    cpus: int | None = None
    memory: int | None = None
    memory_share: int | None = None
    disk: int | None = None


class Policy(Struct, frozen=True):
    """How generously to promise: factors on memory and disk; whether to spread containers by hostname prefix."""

    overcommit_memory: float = 1.0
    overcommit_disk: float = 1.0
    spread_by_hostname: bool = False


class Placement(Struct, frozen=True):
    """The chosen node (None: none fits) and the reason of each node that was looked at."""

    node: str | None
    reasons: dict[str, str]


def place(nodes: list[NodeState], wanted: Wanted, policy: Policy) -> Placement:
    """Choose a node. The same input gives the same answer."""
    reasons: dict[str, str] = {}
    fitting: list[tuple[tuple[float, ...], NodeState]] = []
    for node in sorted(nodes, key=lambda node: node.name):
        refusal = _refusal(node, wanted, policy)
        if refusal is not None:
            reasons[node.name] = refusal
        else:
            fitting.append((_rank(node, policy), node))
    if not fitting:
        return Placement(None, reasons)
    fitting.sort(key=lambda pair: pair[0])
    chosen = fitting[0][1]
    for _, node in fitting[1:]:
        reasons[node.name] = f"fits, but {chosen.name} is preferred: {_comparison(chosen, node, policy)}"
    reasons[chosen.name] = "pinned by the request" if wanted.node else f"chosen: {_strengths(chosen)}"
    return Placement(chosen.name, dict(sorted(reasons.items())))


def _refusal(node: NodeState, wanted: Wanted, policy: Policy) -> str | None:
    if wanted.node is not None and node.name != wanted.node:
        return f"the request names node {wanted.node}"
    if node.status not in TAKES_CONTAINERS:
        return f"the node is {node.status}"
    if node.taken:
        return "an unmanaged container has that id there"
    if wanted.architecture is not None and wanted.architecture != node.architecture:
        return f"architecture {node.architecture}, the image needs {wanted.architecture}"
    return shortage(node, wanted, policy)


def shortage(
    node: NodeState, wanted: Wanted, policy: Policy, *, held_memory: int = 0, held_disk: int = 0
) -> str | None:
    """What a node has too little of for `wanted`; None: it suffices.

    `held_*` is what the container reserves there already, in bytes: its own, however much the node has promised.
    """
    if wanted.cpus is not None and wanted.cpus > node.cpus:
        return f"{node.cpus} CPUs, {wanted.cpus} are asked for"
    if wanted.disk is not None and not node.disk_limits:
        return "its storage cannot hold a disk limit (that needs btrfs)"
    memory = memory_of(wanted, node.memory)
    memory_capacity = int(node.memory * policy.overcommit_memory)
    disk_capacity = int(node.disk * policy.overcommit_disk)
    return _lacking("memory", memory, memory_capacity - node.reserved_memory, held_memory) or _lacking(
        "disk", wanted.disk, disk_capacity - node.reserved_disk, held_disk
    )


def _lacking(what: str, wanted: int | None, unreserved: int, held: int) -> str | None:
    left = unreserved + held
    # What it holds already it may keep on a node that has promised too much.
    if wanted is None or wanted <= left or 0 < wanted <= held:
        return None
    return f"{format_size(max(0, left))} of {what} left to reserve, {format_size(wanted)} are asked for"


def memory_of(wanted: Wanted, node_memory: int) -> int | None:
    """The memory limit in bytes on a node with that much memory."""
    return node_memory * wanted.memory_share // 100 if wanted.memory_share is not None else wanted.memory


def _free_share(node: NodeState) -> float:
    """The scarcer of memory and disk, as a share of the node's."""
    memory_left = min(node.memory_free, node.memory - node.reserved_memory)
    disk_left = min(node.disk_free, node.disk - node.reserved_disk)
    return min(memory_left / node.memory if node.memory else 0.0, disk_left / node.disk if node.disk else 0.0)


def _rank(node: NodeState, policy: Policy) -> tuple[float, ...]:
    doubtful = float(node.status is not NodeStatus.ONLINE)
    peers = float(node.peers) if policy.spread_by_hostname else 0.0
    # Coarse steps of a tenth, so that small differences of use do not outweigh the number of containers.
    return (doubtful, peers, -round(_free_share(node), 1), float(node.containers), -_free_share(node))


def _comparison(chosen: NodeState, other: NodeState, policy: Policy) -> str:
    if chosen.status is not other.status:
        return f"the node is {other.status}"
    if policy.spread_by_hostname and other.peers > chosen.peers:
        return f"{other.peers} containers of the same hostname prefix against {chosen.peers}"
    if round(_free_share(chosen), 1) != round(_free_share(other), 1):
        return f"{_free_share(other):.0%} free against {_free_share(chosen):.0%}"
    if chosen.containers != other.containers:
        return f"{other.containers} containers against {chosen.containers}"
    return f"{_free_share(other):.1%} free against {_free_share(chosen):.1%}"


def _strengths(node: NodeState) -> str:
    return (
        f"{format_size(max(0, node.memory_free))} of memory and {format_size(max(0, node.disk_free))} of disk free, "
        f"{node.containers} containers"
    )
