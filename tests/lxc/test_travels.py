"""Containers travel between three real nodes: whole, directly, and back where they were when anything fails."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.real_fleet import BUSYBOX, RealFleet, quickstart, real_fleet, until
from tests.helpers.trees import describe, difference

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(240)]
FIRST_ID = 1_000_000
OWN = ("etc/hostname", "etc/machine-id", "etc/resolv.conf")
"""What is not the same in a container and its copy, or is written anew at each start."""
DATA_PORT = 8445
MIB = 2**20


@pytest.fixture(scope="module")
def fleet() -> Iterator[RealFleet]:
    with real_fleet(nodes=3) as made:
        yield made


@pytest.fixture
def gone(fleet: RealFleet) -> Iterator[list[str]]:
    """Containers to be removed after the test; then no node keeps anything of a transfer."""
    containers: list[str] = []
    yield containers
    fleet.delete(*containers)
    until(lambda: leftovers(fleet) == [], f"nothing is left of transfers: {leftovers(fleet)}")


def leftovers(fleet: RealFleet) -> list[str]:
    """What transfers left behind in the nodes' pools."""
    found = []
    for node in ("node1", "node2", "node3"):
        pool = fleet.agent_state(node) / "pool"
        found += [str(path) for kind in ("transfers", "staging") for path in (pool / kind).glob("*")]
    return found


def fill(root: Path) -> None:
    """Everything that a file system may hold for an unprivileged container."""
    home = root / "root"
    (home / "data").write_bytes(os.urandom(3 * MIB))
    os.link(home / "data", home / "linked")
    with (home / "sparse").open("wb") as sparse:
        sparse.truncate(512 * MIB)
        sparse.seek(100 * MIB)
        sparse.write(b"in the middle")
    (home / "symlink").symlink_to("/etc/passwd")
    (home / "dangling").symlink_to("../../nowhere")
    (home / os.fsdecode(b"odd \xff\n name")).write_text("odd")
    (home / "empty").mkdir()
    os.mkfifo(home / "fifo")
    (home / "setuid").write_text("#!/bin/sh\n")
    deep = home / "deep"
    for level in range(60):
        deep = deep / f"level{level}"
    deep.mkdir(parents=True)
    (deep / "leaf").write_text("leaf")
    for path in [home, *home.rglob("*")]:
        os.chown(path, FIRST_ID + 7, FIRST_ID + 8, follow_symlinks=False)
    os.chown(home, FIRST_ID, FIRST_ID)
    (home / "setuid").chmod(0o4755)
    os.setxattr(home / "data", "user.note", b"kept")
    os.utime(home / "setuid", ns=(1_600_000_000_123_456_789, 1_600_000_000_123_456_789))


def write(fleet: RealFleet, container: str, name: str, content: bytes) -> None:
    """A file of the container's own root, written from outside."""
    path = fleet.root(container) / name
    path.write_bytes(content)
    os.chown(path, FIRST_ID, FIRST_ID)


def tree(fleet: RealFleet, container: str) -> dict[str, dict[str, Any]]:
    return describe(fleet.root(container), FIRST_ID)


def placed(fleet: RealFleet, container: str) -> list[str]:
    """The nodes on which LXC knows a container."""
    nodes = ("node1", "node2", "node3")
    return [node for node in nodes if (fleet.agent_state(node) / "lxc" / container / "config").exists()]


@contextmanager
def dropped(fleet: RealFleet, node: str) -> Iterator[Callable[[], int]]:
    """No packet reaches a node's data port, all else does; gives how many were lost so far."""
    enter = ["nsenter", f"--net=/proc/{fleet.pid(f'agent-{node}')}/ns/net"]
    rule = f"type filter hook input priority 0; tcp dport {DATA_PORT} counter drop;"
    rules = f"table inet vztest {{ chain input {{ {rule} }}; }}"
    subprocess.run([*enter, "nft", "-f", "-"], input=rules, text=True, check=True)

    def lost() -> int:
        listed = subprocess.run([*enter, "nft", "list", "table", "inet", "vztest"], capture_output=True, text=True)
        found = re.search(r"counter packets (\d+)", listed.stdout)
        return int(found[1]) if found else 0

    try:
        yield lost
    finally:
        subprocess.run([*enter, "nft", "delete", "table", "inet", "vztest"], check=True)


def begin(fleet: RealFleet, container: str, body: dict[str, Any]) -> str:
    """Have an operation on a container begin; its URL."""
    code, answer = fleet.request("POST", f"/1.0/vz/{container}", body)
    assert code == 202, answer
    return str(answer["operation"])


def ended(fleet: RealFleet, operation: str) -> dict[str, Any]:
    shown: dict[str, Any] = fleet.get(f"{operation}/wait?timeout=110")
    assert shown["status_code"] >= 200, shown
    return shown


def sent(fleet: RealFleet, operation: str) -> int:
    """The bytes that an operation's transfer has moved so far."""
    return int(fleet.get(operation)["metadata"].get("progress", {}).get("processed") or 0)


def test_a_move_takes_everything_along_while_it_runs(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1")
    gone.append(container)
    fill(fleet.root(container))
    fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "first"})
    fleet.inside(container, "echo later >/root/later")
    before = tree(fleet, container)
    identity = fleet.inside(container, "cat /etc/machine-id 2>/dev/null; cat /sys/class/net/eth0/address").stdout
    moved = fleet.done("POST", f"/1.0/vz/{container}", {"migration": True, "node": "node2"})
    assert moved["metadata"]["via"] == "direct" and moved["metadata"]["downtime"]["seconds"] < 2
    assert placed(fleet, container) == ["node2"] and fleet.show(container)["status"]["status"] == "Running"
    assert difference(before, tree(fleet, container), OWN) == ""
    after = fleet.inside(container, "cat /etc/machine-id 2>/dev/null; cat /sys/class/net/eth0/address").stdout
    assert after == identity, "it is the same machine"
    fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "first"})
    assert "root/later" not in tree(fleet, container)


def test_a_copy_from_a_running_container_and_from_a_snapshot(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1")
    gone.append(container)
    fill(fleet.root(container))
    fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "s"})
    before = tree(fleet, container)
    for source in (container, f"{container}/s"):
        copy = f"{container}-{len(gone)}"
        gone.append(copy)
        fleet.done("POST", f"/1.0/vz/{copy}", {"source": {"type": "copy", "source": source}, "node": "node3"})
        assert difference(before, tree(fleet, copy), OWN) == ""


def test_a_refresh_brings_the_difference_and_nothing_else(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1")
    copy = f"{container}-copy"
    gone += [container, copy]
    write(fleet, container, "root/big", os.urandom(20 * MIB))
    body = {"source": {"type": "copy", "source": container}, "node": "node2"}
    fleet.done("POST", f"/1.0/vz/{copy}", body)
    fleet.inside(container, "echo new >/root/new; rm -f /etc/motd")
    write(fleet, copy, "root/stray", b"of the copy alone")
    refreshed = fleet.done("POST", f"/1.0/vz/{copy}", {"source": {**body["source"], "refresh": True}})
    assert difference(tree(fleet, container), tree(fleet, copy), OWN) == ""
    assert "root/stray" not in tree(fleet, copy) and fleet.show(copy)["hostname"] == copy
    assert refreshed["metadata"]["bytes"] < 5 * MIB, "the 20 MB that both have are not sent again"


def test_a_device_node_is_refused_and_it_stays_where_it_was(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1")
    gone.append(container)
    os.mknod(fleet.root(container) / "root/disk", 0o60666, os.makedev(254, 0))
    refused = fleet.operation("POST", f"/1.0/vz/{container}", {"migration": True, "node": "node2"})
    assert refused["status"] == "Failure" and "device" in refused["err"], refused
    assert placed(fleet, container) == ["node1"]
    until(lambda: fleet.show(container)["status"]["status"] == "Running", "it runs where it was")


def test_without_a_way_between_the_nodes_the_controller_relays(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1")
    gone.append(container)
    fill(fleet.root(container))
    before = tree(fleet, container)
    with dropped(fleet, "node2"):
        moved = fleet.done("POST", f"/1.0/vz/{container}", {"migration": True, "node": "node2"})
    assert moved["metadata"]["via"] == "relay", moved["metadata"]
    assert difference(before, tree(fleet, container), OWN) == ""


def test_a_cut_on_the_way_is_not_felt_and_the_bandwidth_is_held(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1")
    gone.append(container)
    write(fleet, container, "root/big", os.urandom(40 * MIB))
    before = tree(fleet, container)
    begun = time.monotonic()
    body = {"migration": True, "node": "node2", "bandwidth": "5MB"}
    operation = begin(fleet, container, body)
    until(lambda: sent(fleet, operation) > 4 * MIB, "some of it is there")
    progress = fleet.get(operation)["metadata"]["progress"]
    assert {"stage", "percent", "processed", "total", "speed", "remaining"} <= progress.keys(), progress
    with dropped(fleet, "node2") as lost:
        until(lambda: lost() > 4, "the connection is cut, and what was lost is sent again")
    assert ended(fleet, operation)["status"] == "Success"
    assert time.monotonic() - begun > 6, "40 MiB at 5 MB/s"
    assert difference(before, tree(fleet, container), OWN) == ""


KILLED: dict[str, Callable[[RealFleet], int]] = {
    "controller": lambda fleet: fleet.pid("controller"),
    "sender": lambda fleet: fleet.pid("agent-node1"),
    "receiver": lambda fleet: fleet.pid("agent-node2"),
}


@pytest.mark.parametrize("who", KILLED)
def test_who_dies_on_the_way_does_no_harm(fleet: RealFleet, gone: list[str], who: str) -> None:
    container = fleet.new("node1")
    gone.append(container)
    write(fleet, container, "root/big", os.urandom(24 * MIB))
    before = tree(fleet, container)
    operation = begin(fleet, container, {"migration": True, "node": "node2", "bandwidth": "6MB"})
    until(lambda: sent(fleet, operation) > 2 * MIB, "some of it is there")
    os.kill(KILLED[who](fleet), 9)
    quickstart("--state", str(fleet.state), "--no-demo")
    shown = ended(fleet, operation)
    assert shown["status"] == "Success", shown
    until(lambda: placed(fleet, container) == ["node2"], "it is on one node")
    until(lambda: fleet.show(container)["status"]["status"] == "Running", "it runs")
    assert difference(before, tree(fleet, container), OWN) == ""


def test_what_is_cancelled_on_the_way_stays_where_it_was(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1")
    gone.append(container)
    write(fleet, container, "root/big", os.urandom(24 * MIB))
    operation = begin(fleet, container, {"migration": True, "node": "node2", "bandwidth": "4MB"})
    until(lambda: sent(fleet, operation) > 2 * MIB, "some of it is there")
    assert fleet.request("DELETE", operation)[0] == 200
    assert ended(fleet, operation)["status"] == "Cancelled"
    assert placed(fleet, container) == ["node1"] and fleet.show(container)["status"]["status"] == "Running"


def test_a_published_image_makes_the_same_container_elsewhere(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1")
    made = f"{container}-made"
    gone += [container, made]
    fill(fleet.root(container))
    fleet.state_of(container, "stop", force=True)
    before = tree(fleet, container)
    body = {"source": {"type": "container", "name": container}, "aliases": [{"name": container}]}
    published = fleet.done("POST", "/1.0/images", body)
    fleet.done("POST", f"/1.0/vz/{made}", {"source": {"type": "image", "alias": container}, "node": "node3"})
    assert difference(before, tree(fleet, made), OWN) == ""
    fleet.done("DELETE", f"/1.0/images/{published['metadata']['fingerprint']}")


def test_it_is_made_elsewhere_by_a_create(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new("node1", start=False)
    gone.append(container)
    body = {"source": {"type": "migration", "source": container}, "node": "node2"}
    fleet.done("POST", f"/1.0/vz/{container}", body)
    assert placed(fleet, container) == ["node2"] and fleet.show(container)["image"]["os"] == BUSYBOX["properties"]["os"]
