"""Limits and configuration files changed by hand, and containers taken into management: real ones."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from agent.cgroups import Cgroups
from agent.drivers.lxc import adoption, altered
from common.errors import Conflict, Unsupported
from common.reports import Difference
from common.states import Status
from tests.helpers.busybox import busybox_archive
from tests.lxc.conftest import Node, until
from tests.lxc.test_lxc_lifecycle import by_hand

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(120)]
LIMITS = {
    "limits__memory": "64MiB",
    "limits__processes": "50",
    "limits__cpus": "1",
    "limits__cpu__allowance": "50ms/100ms",
    "limits__disk": "200MiB",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(altered, "LIMITS_EVERY", 1)


def lxc(node: Node, program: str, *arguments: str, id: str = "101") -> None:
    by_hand(program, "-P", str(node.config.state / "lxc"), "-n", id, *arguments)


async def differences(node: Node, id: str = "101") -> dict[str, tuple[str | None, str | None]]:
    return {each.key: (each.expected, each.found) for each in (await node.driver.inspect(id)).altered}


async def heard(node: Node, *expected: Difference) -> None:
    """Wait until the driver has told just these differences without being asked."""
    await until(lambda: node.heard and node.heard[-1][0].altered == expected, timeout=10)


def files() -> tuple[str, str]:
    """The files of the memory limit and of the soft share."""
    v1 = Cgroups.detect().version == "v1"
    return ("memory.limit_in_bytes", "cpu.shares") if v1 else ("memory.max", "cpu.weight")


def outer(node: Node, file: str) -> Path:
    """The container's outer directory in the hierarchy that has this file."""
    directories = Cgroups.detect().container(f"{node.config.cgroup}/101").directories()
    return next(directory for directory in directories if (directory / file).exists())


async def test_limits_altered_by_hand_are_told_and_put_back_by_an_update(node: Node) -> None:
    await node.running("101", **LIMITS)
    assert await differences(node) == {}
    limit, _ = files()
    lxc(node, "lxc-cgroup", limit, str(48 * 2**20))
    wrong = Difference("limits.memory", "64MiB", "48MiB")
    await heard(node, wrong)
    (outer(node, "pids.max") / "pids.max").write_text("max")
    await heard(node, wrong, Difference("limits.processes", "50", None))
    await node.driver.update(node.spec("101", **LIMITS))
    assert await differences(node) == {}
    sample = node.driver.sample(["101"])[0]
    assert sample.memory_limit == 64 * 2**20
    assert (await node.driver.inspect("101")).status == Status.RUNNING


async def test_a_disk_limit_altered_by_hand(node: Node) -> None:
    await node.running("101", **LIMITS)
    by_hand("btrfs", "qgroup", "limit", "100M", str(node.rootfs("101").parent))
    await heard(node, Difference("limits.disk", "200MiB", "100MiB"))
    await node.driver.update(node.spec("101", **LIMITS))
    assert await differences(node) == {}
    assert node.driver.sample(["101"])[0].disk_limit == 200 * 2**20


async def test_a_container_without_limits_that_got_some_by_hand(node: Node) -> None:
    await node.running("101")
    limit, share = files()
    lxc(node, "lxc-cgroup", limit, str(64 * 2**20))
    (outer(node, share) / share).write_text("77")
    lxc(node, "lxc-cgroup", "cpuset.cpus", "0")
    expected = {"limits.memory": (None, "64MiB"), "limits.cpu.allowance": (None, "share 77")}
    if (os.cpu_count() or 1) > 1:
        expected["limits.cpus"] = (None, "pinned to 0")
    await until(lambda: node.heard and len(node.heard[-1][0].altered) == len(expected), timeout=10)
    assert await differences(node) == expected
    await node.driver.update(node.spec("101"))
    assert await differences(node) == {}


async def test_a_configuration_file_edited_by_hand(node: Node) -> None:
    await node.driver.create(node.spec("101", **LIMITS), node.image)
    file = node.config.state / "lxc/101/config"
    text = file.read_text()
    edited = text.replace(str(64 * 2**20), str(32 * 2**20)).replace("host-101", "other")
    file.write_text(f"{edited}lxc.hook.start = /bin/true\n")
    await until(lambda: node.heard and node.heard[-1][0].altered, timeout=5)
    found = await differences(node)
    assert found["lxc.hook.start"] == (None, "/bin/true") and found["lxc.uts.name"] == ("host-101", "other")
    assert found["limits.memory"] == ("64MiB", "32MiB")
    # Lines that come to the same are no difference; nor is what another version of ours has written.
    file.write_text(f"{text}# a note\n")
    await heard(node)
    file.write_text(f"{edited}lxc.hook.start = /bin/true\n")
    await node.driver.start("101")
    assert await differences(node) == {} and "lxc.hook" not in file.read_text()


async def test_a_configuration_file_removed_by_hand(node: Node) -> None:
    await node.running("101")
    file = node.config.state / "lxc/101/config"
    file.unlink()
    await heard(node, Difference("lxc.config", "present", "absent"))
    await node.driver.update(node.spec("101"))
    assert await differences(node) == {} and file.exists()


async def test_a_container_stopped_by_hand_is_told(node: Node) -> None:
    await node.running("101")
    lxc(node, "lxc-stop", "-k")
    await until(lambda: node.heard and node.heard[-1][0].status == Status.STOPPED, timeout=5)


# ---------------------------------------------------------------- made by hand


def foreign(node: Node, tmp_path: Path, id: str = "byhand") -> Path:
    """A container by lxc-create, with busybox in its root; returns its directory."""
    lxc(node, "lxc-create", "-t", "none", id=id)
    directory = node.config.state / "lxc" / id
    root = directory / "rootfs"
    root.mkdir(exist_ok=True)
    archive = tmp_path / "busybox.tar"
    archive.write_bytes(busybox_archive())
    subprocess.run(["tar", "-C", str(root), "-xf", str(archive)], check=True, timeout=30)
    (root / "etc/by-hand").write_text("mine\n")
    with (directory / "config").open("a") as config:
        config.write(f"lxc.rootfs.path = dir:{root}\nlxc.uts.name = byhand\n")
    return directory


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Its entries with inode and owner."""
    found = {str(path.relative_to(directory)): path.lstat() for path in directory.rglob("*")}
    return {name: (facts.st_ino, facts.st_uid) for name, facts in found.items()}


async def test_one_made_by_hand_is_adopted(node: Node, tmp_path: Path) -> None:
    directory = foreign(node, tmp_path)
    await until(lambda: node.heard, timeout=5)
    spec = node.spec("byhand", generation=7, limits__memory="64MiB")
    for _ in range(2):
        await node.driver.adopt(spec, 0)
    await node.driver.start("byhand")
    assert node.attach("byhand", "cat", "/etc/by-hand").stdout == "mine\n"
    assert (node.rootfs("byhand") / "etc/by-hand").stat().st_uid == node.config.first_id
    report = await node.driver.inspect("byhand")
    assert (report.generation, report.status, report.altered) == (7, Status.RUNNING, ())
    aside = directory.with_name(f"{adoption._ASIDE}byhand")
    assert aside.is_dir()
    for _ in range(2):
        await node.driver.settle_adoption("byhand", keep=True)
    assert not aside.exists()
    assert [each.generation for each in await node.driver.containers()] == [7]
    await node.driver.delete("byhand", force=True)
    assert await node.driver.containers() == []


async def test_device_nodes_of_one_made_by_hand_are_left_out(node: Node, tmp_path: Path) -> None:
    """debootstrap makes them; nobody can where an id map holds, and LXC makes /dev anew at each start."""
    directory = foreign(node, tmp_path)
    (directory / "rootfs/dev").mkdir(exist_ok=True)
    os.mknod(directory / "rootfs/dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    await node.driver.adopt(node.spec("byhand", generation=7), 0)
    assert list((node.rootfs("byhand") / "dev").iterdir()) == []
    await node.driver.settle_adoption("byhand", keep=True)
    await node.driver.delete("byhand", force=True)


async def test_one_made_by_hand_is_given_back_as_it_was(node: Node, tmp_path: Path) -> None:
    directory = foreign(node, tmp_path)
    before = tree(directory)
    await node.driver.adopt(node.spec("byhand", generation=7), 0)
    for _ in range(2):
        await node.driver.settle_adoption("byhand", keep=False)
    assert tree(directory) == before
    assert [(each.id, each.generation) for each in await node.driver.containers()] == [("byhand", 0)]
    by_hand("lxc-destroy", "-P", str(node.config.state / "lxc"), "-n", "byhand")


async def test_a_crash_between_leaves_it_as_it_was(node: Node, tmp_path: Path) -> None:
    directory = foreign(node, tmp_path)
    before = tree(directory)
    directory.rename(directory.with_name(f"{adoption._ASIDE}byhand"))
    await node.driver.close()
    await node.driver.open(node.hear)
    assert tree(directory) == before
    by_hand("lxc-destroy", "-P", str(node.config.state / "lxc"), "-n", "byhand")


async def test_what_cannot_be_adopted_stays(node: Node, tmp_path: Path) -> None:
    directory = foreign(node, tmp_path)
    with pytest.raises(Conflict):
        await node.driver.adopt(node.spec("byhand", generation=7), 3)
    with (directory / "config").open("a") as config:
        config.write("lxc.rootfs.path = overlay:/a:/b\n")
    before = tree(directory)
    with pytest.raises(Unsupported):
        await node.driver.adopt(node.spec("byhand", generation=7), 0)
    assert tree(directory) == before
    by_hand("lxc-destroy", "-P", str(node.config.state / "lxc"), "-n", "byhand")
