"""Placement: never a node that cannot hold the request, a reason for every node, the same answer every time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from common.states import NodeStatus
from controller.placement import NodeState, Policy, Wanted, memory_of, place, shortage

GB = 10**9
NODE = NodeState(
    name="n1",
    status=NodeStatus.ONLINE,
    architecture="x86_64",
    cpus=4,
    memory=8 * GB,
    memory_free=8 * GB,
    disk=100 * GB,
    disk_free=100 * GB,
    disk_limits=True,
)
SIZES = st.integers(0, 20 * GB)
NODES = st.lists(
    st.builds(
        NodeState,
        name=st.sampled_from([f"n{number}" for number in range(8)]),
        status=st.sampled_from(NodeStatus),
        architecture=st.sampled_from(["x86_64", "aarch64"]),
        cpus=st.integers(0, 8),
        memory=SIZES,
        memory_free=SIZES,
        disk=SIZES,
        disk_free=SIZES,
        disk_limits=st.booleans(),
        containers=st.integers(0, 50),
        reserved_memory=SIZES,
        reserved_disk=SIZES,
        peers=st.integers(0, 5),
        taken=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda node: node.name,
)
WANTED = st.builds(
    Wanted,
    node=st.none() | st.sampled_from(["n0", "n1", "elsewhere"]),
    architecture=st.none() | st.sampled_from(["x86_64", "aarch64"]),
    cpus=st.none() | st.integers(1, 8),
    memory=st.none() | SIZES,
    memory_share=st.none() | st.integers(1, 100),
    disk=st.none() | SIZES,
)
POLICY = st.builds(Policy, st.floats(0.5, 4), st.floats(0.5, 4), st.booleans())


def fits(node: NodeState, wanted: Wanted, policy: Policy) -> bool:
    """What must hold of a node that is chosen, said in another way than placement says it."""
    memory, disk = memory_of(wanted, node.memory), wanted.disk
    return (
        node.status in (NodeStatus.ONLINE, NodeStatus.SUSPECT)
        and not node.taken
        and wanted.node in (None, node.name)
        and wanted.architecture in (None, node.architecture)
        and (wanted.cpus or 0) <= node.cpus
        and (memory is None or node.reserved_memory + memory <= int(node.memory * policy.overcommit_memory))
        and (
            disk is None or (node.disk_limits and node.reserved_disk + disk <= int(node.disk * policy.overcommit_disk))
        )
    )


@given(NODES, WANTED, POLICY)
def test_it_chooses_a_node_that_fits_if_there_is_one(nodes: list[NodeState], wanted: Wanted, policy: Policy) -> None:
    able = {node.name for node in nodes if fits(node, wanted, policy)}
    chosen = place(nodes, wanted, policy)
    assert chosen.node in able if able else chosen.node is None


@given(NODES, WANTED, POLICY)
def test_every_node_has_a_reason(nodes: list[NodeState], wanted: Wanted, policy: Policy) -> None:
    chosen = place(nodes, wanted, policy)
    assert chosen.reasons.keys() == {node.name for node in nodes}
    assert all(chosen.reasons.values())
    preferred = [reason for reason in chosen.reasons.values() if reason.startswith("fits, but")]
    assert len(preferred) == max(0, sum(fits(node, wanted, policy) for node in nodes) - 1)


@given(NODES, WANTED, POLICY, st.randoms(use_true_random=False))
def test_the_order_of_the_nodes_does_not_matter(
    nodes: list[NodeState], wanted: Wanted, policy: Policy, chance: random.Random
) -> None:
    shuffled = list(nodes)
    chance.shuffle(shuffled)
    assert place(nodes, wanted, policy) == place(shuffled, wanted, policy)


@given(st.integers(1, 100), st.integers(1, 30))
def test_a_node_is_never_promised_twice(share: int, count: int) -> None:
    """Created one after the other, with what each reserves counted for the next."""
    nodes = {name: replace(NODE, name=name) for name in ("n1", "n2")}
    wanted = Wanted(memory_share=share, disk=9 * GB)
    for _ in range(count):
        chosen = place(list(nodes.values()), wanted, Policy()).node
        if chosen is None:
            break
        node = nodes[chosen]
        nodes[chosen] = replace(
            node,
            containers=node.containers + 1,
            reserved_memory=node.reserved_memory + (memory_of(wanted, node.memory) or 0),
            reserved_disk=node.reserved_disk + 9 * GB,
        )
    assert all(node.reserved_memory <= node.memory and node.reserved_disk <= node.disk for node in nodes.values())
    assert sum(node.containers for node in nodes.values()) == min(count, 2 * min(100 // share, 11))


@pytest.mark.parametrize(
    ("change", "wanted", "reason"),
    [
        ({"status": NodeStatus.OFFLINE}, {}, "Offline"),
        ({"status": NodeStatus.DRAINING}, {}, "Draining"),
        ({"taken": True}, {}, "unmanaged"),
        ({}, {"node": "n9"}, "n9"),
        ({}, {"architecture": "aarch64"}, "aarch64"),
        ({}, {"cpus": 5}, "4 CPUs"),
        ({"reserved_memory": 7 * GB}, {"memory": 2 * GB}, "1GB of memory left"),
        ({"reserved_memory": 9 * GB}, {"memory_share": 1}, "0B of memory left"),
        ({"reserved_disk": 99 * GB}, {"disk": 2 * GB}, "1GB of disk left"),
        ({"disk_limits": False}, {"disk": GB}, "btrfs"),
    ],
)
def test_the_reason_names_what_is_missing(change: dict[str, object], wanted: dict[str, object], reason: str) -> None:
    chosen = place([replace(NODE, **change)], Wanted(**wanted), Policy())  # type: ignore[arg-type]
    assert chosen.node is None and reason in chosen.reasons["n1"]


def test_overcommit_promises_more_of_memory_and_disk_apart() -> None:
    full = replace(NODE, reserved_memory=8 * GB, reserved_disk=100 * GB)
    assert place([full], Wanted(memory=8 * GB), Policy(overcommit_memory=2.0)).node == "n1"
    assert place([full], Wanted(memory=8 * GB + 1), Policy(overcommit_memory=2.0)).node is None
    assert place([full], Wanted(disk=100 * GB), Policy(overcommit_memory=2.0)).node is None
    assert place([full], Wanted(disk=100 * GB), Policy(overcommit_disk=2.0)).node == "n1"


def test_what_a_container_holds_already_is_its_own() -> None:
    full = replace(NODE, reserved_memory=9 * GB, reserved_disk=101 * GB)
    held = {"held_memory": 2 * GB, "held_disk": 3 * GB}
    for wanted in (Wanted(memory=2 * GB, disk=3 * GB), Wanted(memory=GB, disk=GB), Wanted(memory_share=25)):
        assert shortage(full, wanted, Policy(), **held) is None
        assert shortage(full, wanted, Policy()) is not None
    assert "1GB of memory left" in (shortage(full, Wanted(memory=2 * GB + 1), Policy(), **held) or "")
    assert "2GB of disk left" in (shortage(full, Wanted(disk=3 * GB + 1), Policy(), **held) or "")


def test_what_is_preferred() -> None:
    other = replace(NODE, name="n2")
    crowded = replace(NODE, peers=3)
    assert place([NODE, other], Wanted(), Policy()).node == "n1"
    assert place([other, NODE], Wanted(), Policy()).node == "n1", "equal nodes go by their names"
    assert place([crowded, other], Wanted(), Policy()).node == "n1"
    assert place([crowded, other], Wanted(), Policy(spread_by_hostname=True)).node == "n2"
    assert place([replace(NODE, memory_free=GB), other], Wanted(), Policy()).node == "n2"
    assert place([replace(NODE, reserved_disk=90 * GB), other], Wanted(), Policy()).node == "n2"
    assert place([replace(NODE, containers=1), other], Wanted(), Policy()).node == "n2"
    assert place([replace(NODE, status=NodeStatus.SUSPECT), other], Wanted(), Policy()).node == "n2"
    assert place([replace(NODE, status=NodeStatus.SUSPECT)], Wanted(), Policy()).node == "n1"
