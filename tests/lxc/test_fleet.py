"""The main job on real containers: three nodes with their own agents, seen and driven through one REST endpoint."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.real_fleet import BUSYBOX, RealFleet, quickstart, real_fleet, until

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def fleet() -> Iterator[RealFleet]:
    with real_fleet(nodes=3) as made:
        yield made


@pytest.fixture
def gone(fleet: RealFleet) -> Iterator[list[str]]:
    """Containers to be removed after the test, whatever happened."""
    containers: list[str] = []
    yield containers
    fleet.delete(*containers)


# ---------------------------------------------------------------- life


def test_a_container_lives_as_the_document_says(fleet: RealFleet, gone: list[str]) -> None:
    body = {"hostname": "my-container", "config": {"limits.memory": "64MB"}, "source": BUSYBOX}
    gone.append("101")
    fleet.done("POST", "/1.0/vz/101", body)
    assert fleet.show("101")["status"]["status"] == "Stopped"
    fleet.state_of("101", "start")
    shown = fleet.show("101")
    assert (shown["status"]["status"], shown["status"]["status_code"]) == ("Running", 103)
    assert shown["status"]["machine"][0]["memory"] == "64MB"
    assert Path(f"/proc/{fleet.init('101')}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
    assert fleet.inside("101", "hostname").stdout == "my-container\n"
    assert fleet.inside("101", "cat /etc/hostname").stdout == "my-container\n"
    address = fleet.address("101")
    assert address in fleet.inside("101", "ip -4 address show dev eth0").stdout
    fleet.state_of("101", "restart", timeout=10)
    assert fleet.address("101") == address
    fleet.state_of("101", "stop", timeout=10)
    assert fleet.show("101")["status"]["status"] == "Stopped"
    fleet.done("DELETE", "/1.0/vz/101")
    assert fleet.request("GET", "/1.0/vz/101")[0] == 404


def test_freeze_is_seen_in_the_kernel(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new()
    gone.append(container)
    fleet.state_of(container, "freeze")
    assert fleet.show(container)["status"]["status"] == "Frozen"
    init = fleet.init(container)
    v1 = Path("/sys/fs/cgroup/freezer")
    if v1.is_dir():
        assert (fleet.cgroup(container, "freezer") / "freezer.state").read_text().strip() in ("FROZEN", "THAWED")
    code, answer = fleet.request("PUT", f"/1.0/vz/{container}/state", {"action": "stop"})
    assert code == 400 and answer["metadata"]["field"] == "action"
    fleet.state_of(container, "unfreeze")
    assert fleet.show(container)["status"]["status"] == "Running" and fleet.init(container) == init


def test_a_container_that_dies_shows_it_within_two_seconds(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new()
    gone.append(container)
    os.kill(fleet.init(container), signal.SIGKILL)
    until(lambda: fleet.show(container)["status"]["status"] == "Stopped", "the death is shown", 2.0)


@pytest.mark.parametrize("how", ["reboot", "reboot -f"])
def test_a_reboot_from_inside_is_followed(fleet: RealFleet, gone: list[str], how: str) -> None:
    container = fleet.new()
    gone.append(container)
    before = fleet.init(container)
    fleet.inside(container, how, check=False)

    def came_back() -> bool:
        state = fleet.get(f"/1.0/vz/{container}/state")
        return state["status"] == "Running" and state["pid"] not in (None, before)

    until(came_back, "it runs again with another init")


# ---------------------------------------------------------------- limits


def test_memory_is_limited_and_can_be_changed_live(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(config={"limits.memory": "32MiB"})
    gone.append(container)
    # dd holds one block in memory.
    hog = "dd if=/dev/zero of=/dev/null bs=48M count=1"
    assert fleet.inside(container, hog, check=False).returncode != 0
    shown = fleet.show(container)
    fleet.done("PUT", f"/1.0/vz/{container}", {**shown, "config": {"limits.memory": "96MiB"}})
    assert fleet.inside(container, hog).returncode == 0
    assert fleet.show(container)["status"]["machine"][0]["memory"] == "100.66MB"
    assert "98304 kB" in fleet.inside(container, "grep MemTotal /proc/meminfo").stdout


def test_processes_are_limited(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(config={"limits.processes": "20"})
    gone.append(container)
    script = "for n in $(seq 40); do sleep 30 & done; wait"
    assert "fork" in fleet.inside(container, f"timeout 2 sh -c '{script}' 2>&1", check=False).stdout
    fleet.inside(container, "killall sleep", check=False)


def test_cpu_is_limited_by_quota_and_by_pinning(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(config={"limits.cpu.allowance": "20ms/100ms", "limits.cpus": "1"})
    gone.append(container)
    allowed = fleet.inside(container, "grep Cpus_allowed_list /proc/self/status").stdout.split()[1]
    assert re.fullmatch(r"\d+", allowed)
    before = fleet.get(f"/1.0/vz/{container}/state")["cpu"]["usage"]
    started = time.monotonic()
    fleet.inside(container, "timeout 2 sh -c 'while :; do :; done'", check=False)
    spent = time.monotonic() - started

    def later() -> Any:
        usage = fleet.get(f"/1.0/vz/{container}/state")["cpu"]["usage"]
        return usage if usage > before + 10**8 else None

    used = (until(later, "a sample after the load") - before) / 10**9
    assert used < 0.35 * spent + 0.2


def test_the_disk_is_limited_and_cannot_be_escaped(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(config={"limits.disk": "30MB"})
    gone.append(container)
    fill = "dd if=/dev/zero of=/fill bs=1M count=60 conv=fsync 2>&1"
    assert fleet.inside(container, fill, check=False).returncode != 0
    size = (fleet.root(container) / "fill").stat().st_size
    assert size < 31_000_000
    assert fleet.show(container)["status"]["machine"][0]["disk_space"] == "30MB"
    fleet.inside(container, "rm /fill; sync")
    shown = fleet.show(container)
    fleet.done("PUT", f"/1.0/vz/{container}", {**shown, "config": {"limits.disk": "120MB"}})
    assert fleet.inside(container, fill).returncode == 0


def test_limits_below_its_use_are_refused_before_anything_happens(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new()
    gone.append(container)
    fleet.inside(container, "dd if=/dev/urandom of=/fill bs=1M count=40; sync")
    # tail keeps what it reads until the end.
    held = "{ head -c 30000000 /dev/zero; sleep 120; } | tail -c 30000000"
    fleet.inside(container, f"({held}) >/dev/null 2>&1 </dev/null &")

    def is_known() -> bool:
        state = fleet.get(f"/1.0/vz/{container}/state")
        disk, memory = state["disk"]["root"]["usage"], state["memory"]
        return bool(disk > 40 * 10**6 and memory["usage"] - memory["reclaimable"] > 29 * 10**6)

    until(is_known, "the figures show it", 40)
    for key, value in (("limits.disk", "30MB"), ("limits.memory", "20MB")):
        code, answer = fleet.request("PUT", f"/1.0/vz/{container}", {"config": {key: value}})
        assert (code, answer["metadata"]["field"]) == (400, f"config.{key}"), answer
        fleet.done("PUT", f"/1.0/vz/{container}", {"config": {key: "200MB"}})
    body = {"source": {"type": "copy", "source": container}, "config": {"limits.disk": "30MB"}}
    assert fleet.request("POST", f"/1.0/vz/{container}-b", body)[0] == 400


def test_a_container_made_by_hand_is_known_within_an_interval(fleet: RealFleet, gone: list[str]) -> None:
    place = ["-P", str(fleet.agent_state("node2") / "lxc"), "-n", "byhand"]
    body = {"source": BUSYBOX, "node": "node2"}

    def unmanaged() -> bool:
        return bool(fleet.get("/1.0/nodes/node2")["unmanaged"] == ["byhand"])

    subprocess.run(["lxc-create", *place, "-t", "none"], check=True, timeout=20)
    try:
        until(unmanaged, "it is shown", 5)
        code, answer = fleet.request("POST", "/1.0/vz/byhand", body)
        assert (code, "unmanaged" in answer["metadata"]["nodes"]["node2"]) == (409, True), answer
    finally:
        subprocess.run(["lxc-destroy", *place], check=True, timeout=20)
    until(lambda: not unmanaged(), "it is gone", 5)
    gone.append("byhand")
    fleet.done("POST", "/1.0/vz/byhand", body)


def test_limits_are_out_of_the_containers_reach(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(config={"limits.memory": "32MiB", "limits.processes": "64"})
    gone.append(container)
    script = """
        for file in $(find /sys/fs/cgroup -name 'memory.limit_in_bytes' -o -name 'memory.max' -o -name 'pids.max'); do
            echo 1000000000 > $file
        done 2>/dev/null
        mkdir -p /sys/fs/cgroup/memory/own /sys/fs/cgroup/own 2>/dev/null
        true
    """
    fleet.inside(container, script)
    assert fleet.inside(container, "dd if=/dev/zero of=/dev/null bs=48M count=1", check=False).returncode != 0


# ---------------------------------------------------------------- snapshots, copies, moves, sources


def digest(fleet: RealFleet, container: str, path: str) -> str:
    data = fleet.inside(container, f"cat {path}").stdout
    return hashlib.sha256(data.encode()).hexdigest()


def test_snapshot_and_restore_keep_identity(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new()
    gone.append(container)
    address = fleet.address(container)
    fleet.inside(container, "echo first > /root/note")
    fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "before"})
    fleet.inside(container, "echo second > /root/note")
    fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "before"})
    assert fleet.show(container)["status"]["status"] == "Running"
    assert fleet.inside(container, "cat /root/note").stdout == "first\n"
    assert fleet.address(container) == address
    assert [entry["name"] for entry in fleet.get(f"/1.0/vz/{container}/snapshots?recursion=1")] == ["before"]
    fleet.done("DELETE", f"/1.0/vz/{container}/snapshots/before")
    assert fleet.get(f"/1.0/vz/{container}/snapshots") == []


@pytest.mark.parametrize("target", ["node1", "node2"])
def test_a_copy_has_the_same_files_and_its_own_identity(fleet: RealFleet, gone: list[str], target: str) -> None:
    container = fleet.new(node="node1")
    copy = f"{container}-copy"
    gone += [container, copy]
    fleet.inside(
        container, "head -c 100000 /dev/urandom | base64 > /root/data; ln /root/data /root/link; chown 7:8 /root/data"
    )
    body = {"source": {"type": "copy", "source": container}, "node": target, "start": True}
    fleet.done("POST", f"/1.0/vz/{copy}", body)
    assert fleet.show(copy)["node"] == target
    assert digest(fleet, copy, "/root/data") == digest(fleet, container, "/root/data")
    assert fleet.inside(copy, "stat -c '%u %g %h' /root/data").stdout == "7 8 2\n"
    assert (
        fleet.inside(copy, "cat /sys/class/net/eth0/address").stdout
        != fleet.inside(container, "cat /sys/class/net/eth0/address").stdout
    )


def test_a_move_takes_everything_along(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(node="node1", config={"limits.memory": "64MB"})
    gone.append(container)
    fleet.inside(container, "echo one > /root/note")
    fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "s1"})
    fleet.inside(container, "echo two > /root/note")
    fleet.done("POST", f"/1.0/vz/{container}", {"migration": True, "node": "node3"})
    shown = fleet.show(container)
    assert (shown["node"], shown["status"]["status"]) == ("node3", "Running")
    assert fleet.inside(container, "cat /root/note").stdout == "two\n"
    assert not (fleet.agent_state("node1") / "lxc" / container).exists()
    assert not (fleet.agent_state("node1") / "pool" / "containers" / container).exists()
    fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "s1"})
    assert fleet.inside(container, "cat /root/note").stdout == "one\n"
    body = {"source": {"type": "migration", "source": container}, "node": "node2"}
    moved = f"{container}-moved"
    gone.append(moved)
    fleet.done("POST", f"/1.0/vz/{moved}", body)
    assert fleet.show(moved)["node"] == "node2" and fleet.request("GET", f"/1.0/vz/{container}")[0] == 404
    assert fleet.inside(moved, "cat /root/note").stdout == "one\n"


def test_renaming(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new()
    other = f"{container}-b"
    gone += [container, other]
    fleet.done("POST", f"/1.0/vz/{container}", {"hostname": "other-name"})
    assert fleet.show(container)["hostname"] == "other-name"
    fleet.state_of(container, "stop", force=True)
    fleet.done("POST", f"/1.0/vz/{container}", {"name": other})
    fleet.state_of(other, "start")
    assert fleet.inside(other, "hostname").stdout == "other-name\n"


def tarball(files: dict[str, str]) -> bytes:
    made = io.BytesIO()
    busybox = (
        Path("/usr/bin/busybox").read_bytes()
        if Path("/usr/bin/busybox").exists()
        else Path("/bin/busybox").read_bytes()
    )
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, text in files.items():
            data = busybox if text == "BUSYBOX" else text.encode()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


ROOTFS = {
    "bin/busybox": "BUSYBOX",
    "bin/sh": "BUSYBOX",
    "sbin/init": "BUSYBOX",
    "etc/inittab": "::sysinit:/bin/busybox true\n",
    "etc/mark": "imported\n",
    "dev/.keep": "",
    "proc/.keep": "",
    "sys/.keep": "",
}


@pytest.mark.parametrize("layout", ["rootfs", "unified"])
def test_an_imported_image_runs(fleet: RealFleet, gone: list[str], layout: str) -> None:
    files = dict(ROOTFS)
    if layout == "unified":
        files = {f"rootfs/{name}": text for name, text in files.items()}
        files["metadata.yaml"] = (
            "architecture: x86_64\ncreation_date: 1700000000\nproperties:\n  os: mine\n  release: '1'\n"
        )
    imported = fleet.done("POST", f"/1.0/images?alias=mine-{layout}", data=tarball(files))
    fingerprint = imported["metadata"]["fingerprint"]
    try:
        container = fleet.new(source={"type": "image", "alias": f"mine-{layout}"})
        gone.append(container)
        assert fleet.inside(container, "/bin/busybox cat /etc/mark").stdout == "imported\n"
        assert fleet.show(container)["image"]["fingerprint"] == fingerprint
    finally:
        fleet.done("DELETE", f"/1.0/images/{fingerprint[:12]}")
    assert fleet.request("GET", f"/1.0/images/{fingerprint}")[0] == 404


def test_a_split_image_uploaded_in_two_parts_runs(fleet: RealFleet, gone: list[str]) -> None:
    root = tarball(ROOTFS)
    metadata = tarball({"metadata.yaml": "architecture: x86_64\nproperties:\n  os: mine\n"})
    pieces = []
    for part, content in (("metadata", metadata), ("rootfs", root)):
        head = f'--parts\r\nContent-Disposition: form-data; name="{part}"; filename="{part}"\r\n\r\n'
        pieces += [head.encode(), content, b"\r\n"]
    kind = {"Content-Type": "multipart/form-data; boundary=parts"}
    code, answer = fleet.request("POST", "/1.0/images", data=b"".join((*pieces, b"--parts--\r\n")), headers=kind)
    assert code == 202, answer
    imported = fleet.get(f"{answer['operation']}/wait?timeout=60")
    assert imported["status"] == "Success", imported
    assert imported["metadata"]["fingerprint"] == hashlib.sha256(metadata + root).hexdigest()
    container = fleet.new(source={"type": "image", "fingerprint": imported["metadata"]["fingerprint"]})
    gone.append(container)
    assert fleet.inside(container, "/bin/busybox cat /etc/mark").stdout == "imported\n"
    fleet.done("DELETE", f"/1.0/images/{imported['metadata']['fingerprint']}")


def test_an_empty_container_can_be_filled(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(start=False, source={"type": "none"})
    gone.append(container)
    assert fleet.operation("PUT", f"/1.0/vz/{container}/state", {"action": "start"})["status"] == "Failure"
    assert fleet.show(container)["status"]["status"] == "Stopped"


# ---------------------------------------------------------------- processes that die


def test_a_killed_agent_touches_no_container(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(node="node2")
    gone.append(container)
    init = fleet.init(container)
    os.kill(fleet.pid("agent-node2"), signal.SIGKILL)
    until(lambda: fleet.get("/1.0/nodes/node2")["status"] == "Offline", "node2 Offline", 11.0)
    status = fleet.show(container)["status"]
    assert (status["status"], status["status_code"], status["last_status"]) == ("Error", 112, "Running")
    assert "node2" in status["reason"] and status["machine"][0]["disk_usage"]
    assert fleet.request("POST", "/1.0/vz/never", {"source": BUSYBOX, "node": "node2"})[0] == 503
    assert Path(f"/proc/{init}").exists()
    quickstart("--state", str(fleet.state), "--no-demo")
    until(lambda: fleet.show(container)["status"]["status"] == "Running", "it is seen again")
    assert fleet.init(container) == init


def test_a_killed_controller_forgets_nothing(fleet: RealFleet, gone: list[str]) -> None:
    container = fleet.new(node="node1")
    gone.append(container)
    init = fleet.init(container)
    os.kill(fleet.pid("controller"), signal.SIGKILL)
    quickstart("--state", str(fleet.state), "--no-demo")
    until(lambda: fleet.show(container)["status"]["status"] == "Running", "it is seen again")
    assert fleet.init(container) == init
    found = fleet.get(f"/1.0/operations?container={container}&recursion=1")
    assert found["success"][0]["kind"] == "container.create"


def test_a_drained_node_is_empty_and_gets_everything_back(fleet: RealFleet, gone: list[str]) -> None:
    one, two = fleet.new(node="node1"), fleet.new(node="node1")
    gone += [one, two]
    fleet.inside(one, "echo kept > /mark")
    inits = {fleet.init(one), fleet.init(two)}
    ended = fleet.done("POST", "/1.0/nodes/node1/state", {"action": "drain"})
    assert {entry["container"] for entry in ended["metadata"]["done"]} >= {one, two}
    assert not any(Path(f"/proc/{init}").exists() for init in inits)
    assert not any((fleet.agent_state("node1") / "lxc" / container).exists() for container in (one, two))
    for container in (one, two):
        shown = fleet.show(container)
        assert shown["node"] != "node1" and shown["status"]["status"] == "Running"
    assert fleet.inside(one, "cat /mark").stdout == "kept\n"
    assert fleet.get("/1.0/nodes/node1")["status"] == "Draining"
    fleet.done("POST", "/1.0/nodes/node1/state", {"action": "restore"})
    assert fleet.get("/1.0/nodes/node1")["status"] == "Online"
    for container in (one, two):
        assert fleet.show(container)["node"] == "node1" and fleet.init(container)


def test_a_fenced_host_that_was_on_stops_what_was_recovered_elsewhere(fleet: RealFleet, gone: list[str]) -> None:
    killed, runs_on = fleet.new(node="node2"), fleet.new(node="node2")
    gone += [killed, runs_on]
    old = {killed: fleet.init(killed), runs_on: fleet.init(runs_on)}
    os.kill(fleet.pid("agent-node2"), signal.SIGKILL)
    os.kill(old[killed], signal.SIGKILL)
    until(lambda: fleet.get("/1.0/nodes/node2")["status"] == "Offline", "node2 Offline", 11.0)
    assert fleet.request("POST", f"/1.0/vz/{killed}", {"recover": True})[0] == 409
    code, answer = fleet.request("POST", "/1.0/nodes/node2/state", {"action": "fence", "confirm": "node2"})
    assert code == 200 and set(answer["metadata"]["containers"]) >= {killed, runs_on}
    for container in (killed, runs_on):
        fleet.done("POST", f"/1.0/vz/{container}", {"recover": True, "start": True})
        shown = fleet.show(container)
        assert shown["node"] != "node2" and shown["status"]["status"] == "Running"
    assert Path(f"/proc/{old[runs_on]}").exists()
    quickstart("--state", str(fleet.state), "--no-demo")
    # Its older generation is stopped before the node counts as reachable, and nothing of it is deleted.
    shown = fleet.get("/1.0/nodes/node2")
    assert shown["status"] == "Draining" and set(shown["unmanaged"]) >= {killed, runs_on}
    assert not Path(f"/proc/{old[runs_on]}").exists()
    for container in (killed, runs_on):
        assert (fleet.agent_state("node2") / "lxc" / container).exists()
        assert fleet.show(container)["node"] != "node2" and fleet.init(container)
    fleet.done("POST", "/1.0/nodes/node2/state", {"action": "restore"})
    assert fleet.get("/1.0/nodes/node2")["status"] == "Online"


def test_dhcp_names_and_traffic_between_containers(fleet: RealFleet, gone: list[str]) -> None:
    one, two = fleet.new(node="node1"), fleet.new(node="node1")
    gone += [one, two]
    fleet.address(one)
    address = fleet.address(two)
    assert fleet.inside(one, f"ping -c 1 -W 3 {address}").returncode == 0
    assert address in fleet.inside(one, f"nslookup {two}", check=False).stdout


def test_nothing_of_a_container_stays(fleet: RealFleet) -> None:
    container = fleet.new(node="node3")
    groups = {str(fleet.cgroup(container, name)) for name in ("memory", "pids", "cpu")}
    fleet.delete(container)
    until(lambda: not any(Path(group).exists() for group in groups), "its cgroups are gone")
    state = fleet.agent_state("node3")
    assert not (state / "lxc" / container).exists()
    assert container not in subprocess.run(["findmnt", "-l"], capture_output=True, text=True).stdout
