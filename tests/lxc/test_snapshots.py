"""Snapshots, restores and copies of real containers: in constant time on btrfs, with shared blocks where there are any.

What a container is (id, names, addresses, limits) stays through a restore, and is shared with no copy.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.storage.dir import DirStorage
from common.states import Status
from tests.helpers.busybox import busybox_archive, with_files
from tests.lxc.conftest import MIB, Node, make_config, open_node, state_place, until

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(180)]
FILES = 20_000
ROUNDS = 3
SAID_BY_MACHINE_ID = b"0123456789abcdef0123456789abcdef\n"
_FIEMAP = 0xC020660B  # FS_IOC_FIEMAP of linux/fiemap.h, the size of its head alone
_EXTENTS = 256
_LAST, _SHARED = 0x0001, 0x2000


# ---------------------------------------------------------------- constant time


def fill(root: Path, megabytes: int, files: int) -> None:
    """Data and files in a container's root, on disk when this returns."""
    with (root / "data").open("wb") as data:
        for _ in range(megabytes):
            data.write(os.urandom(MIB))
    for number in range(files):
        if number % 1000 == 0:
            directory = root / f"files{number // 1000}"
            directory.mkdir()
        (directory / str(number)).write_text("x" * 100)
    # A snapshot writes out what is in memory only: that is the writer's time, not the snapshot's.
    descriptor = os.open(root, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    subprocess.run(["sync", "-f", str(root)], check=True, timeout=120)


async def seconds(work: Awaitable[None]) -> float:
    begun = time.monotonic()
    await work
    return time.monotonic() - begun


async def best_times(node: Node, id: str) -> dict[str, float]:
    """Seconds that each kind of work takes at its best: others work on this machine, too."""
    driver = node.driver
    times: dict[str, list[float]] = {"snapshot": [], "restore": [], "copy": [], "copy of a snapshot": []}
    for number in range(ROUNDS):
        name, copies = f"s{number}", (f"{id}-a{number}", f"{id}-b{number}")
        times["snapshot"].append(await seconds(driver.create_snapshot(id, name)))
        times["restore"].append(await seconds(driver.restore_snapshot(id, name)))
        times["copy"].append(await seconds(driver.copy(node.spec(copies[0]), id, None)))
        times["copy of a snapshot"].append(await seconds(driver.copy(node.spec(copies[1]), id, name)))
    return {kind: min(each) for kind, each in times.items()}


async def test_a_big_one_takes_no_longer_than_a_small_one(state_directory: Path, own_network: str) -> None:
    """1 GB in 20,000 files and one, against 1 MB."""
    async with open_node(make_config(state_directory, own_network, pool_size=4096 * MIB)) as node:
        for id, megabytes, files in (("small", 1, 0), ("big", 1024, FILES)):
            await node.driver.create(node.spec(id), node.image)
            fill(node.rootfs(id), megabytes, files)
        small, big = await best_times(node, "small"), await best_times(node, "big")
        assert (node.rootfs("big-b0") / "data").stat().st_size == 1024 * MIB
        slow = {kind: (took, small[kind]) for kind, took in big.items() if took > 2 * small[kind] + 0.1}
        assert slow == {}


# ---------------------------------------------------------------- what a container is


def address(node: Node, id: str) -> str | None:
    """Its IPv4 address, once DHCP has given it one."""
    (sample,) = node.driver.sample([id])
    found = [one for card in sample.interfaces for one in card.addresses if one.scope == "global"]
    return next((one.address for one in found if one.family == "inet"), None)


async def test_a_restored_container_is_who_it_was(node: Node) -> None:
    """Its files go back, and its id, hostname, hardware address, lease and limits stay."""
    config = {"limits__memory": "64MiB", "limits__processes": "60", "limits__disk": "200MB"}
    await node.running(**config)
    before = await until(lambda: address(node, "101"))
    node.attach("101", "sh", "-c", "echo old > /root/file; sync")
    await node.driver.create_snapshot("101", "s")
    node.attach("101", "sh", "-c", "echo new > /root/file; echo more > /root/more; sync")
    changed = node.spec(hostname="renamed", **{**config, "limits__memory": "96MiB"})
    await node.driver.update(changed)
    await node.driver.stop("101", 0, force=True)
    await node.driver.restore_snapshot("101", "s")
    await node.driver.start("101")
    report = await node.driver.inspect("101")
    assert (report.id, report.hostname, report.hwaddr) == ("101", "renamed", node.spec().hwaddr)
    assert report.config == changed.config and [one.name for one in report.snapshots] == ["s"]
    assert await until(lambda: address(node, "101")) == before
    inside = node.attach("101", "sh", "-c", "cat /root/file /etc/hostname; ls /root; hostname")
    assert inside.stdout.split() == ["old", "renamed", "file", "renamed"]
    assert f"ether {report.hwaddr}" in node.attach("101", "ip", "link", "show", "eth0").stdout.replace(
        "link/ether", "ether"
    )
    (sample,) = node.driver.sample(["101"])
    assert (sample.memory_limit, sample.disk_limit) == (96 * MIB, 200 * 10**6)
    full = node.attach("101", "sh", "-c", "dd if=/dev/zero of=/root/big bs=1M count=300 2>&1; sync")
    assert "No space" in full.stdout or "quota" in full.stdout.lower()


async def test_copies_that_run_at_once_share_nothing(node: Node) -> None:
    """Not hostname, addresses or machine-id: of each other, or of the one that they were made of."""
    archive = with_files(busybox_archive(), {"etc/machine-id": (0o444, SAID_BY_MACHINE_ID)})
    node.image = await node.have_image(archive=archive)
    await node.running()
    await node.driver.create_snapshot("101", "s")
    for id, snapshot in (("102", None), ("103", "s")):
        await node.driver.copy(node.spec(id), "101", snapshot)
        await node.driver.start(id)
    seen = []
    for id in ("101", "102", "103"):
        given = await until(lambda id=id: address(node, id))
        said = node.attach(
            id, "sh", "-c", "cat /etc/machine-id /etc/hostname; hostname; cat /sys/class/net/eth0/address"
        )
        machine, written, hostname, hwaddr = said.stdout.split()
        assert (written, hostname, hwaddr) == (f"host-{id}", f"host-{id}", node.spec(id).hwaddr)
        assert machine != SAID_BY_MACHINE_ID.decode().strip() and len(machine) == 32
        seen.append((given, machine, hostname, hwaddr))
    for each in zip(*seen, strict=True):
        assert len(set(each)) == 3, each
    leases = {id: node.attach(id, "sh", "-c", "ip -4 -o addr show eth0").stdout for id in ("101", "102", "103")}
    assert len(set(leases.values())) == 3
    assert [(await node.driver.inspect(id)).status for id in ("101", "102", "103")] == [Status.RUNNING] * 3


# ---------------------------------------------------------------- storage on plain directories


@contextmanager
def file_system(place: Path, make: list[str]) -> Iterator[Path]:
    """A file system of its own in a loop file below `place`."""
    disk, mount = place / "disk", place / "mount"
    with disk.open("wb") as file:
        file.truncate(512 * MIB)
    mount.mkdir()
    subprocess.run([*make, str(disk)], check=True, capture_output=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", str(disk), str(mount)], check=True, timeout=30)
    try:
        mount.chmod(0o711)
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=30)
        mount.rmdir()
        disk.unlink()


def shared_extents(file: Path) -> tuple[int, int]:
    """(shared, all): how many of a file's extents belong to another file as well (ioctl_fiemap)."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        answer = bytearray(struct.pack("=QQLLLL", 0, 2**64 - 1, 0, 0, _EXTENTS, 0) + bytes(56 * _EXTENTS))
        fcntl.ioctl(opened, _FIEMAP, answer)
    mapped = struct.unpack_from("=L", answer, 20)[0]
    flags = [struct.unpack_from("=L", answer, 32 + 56 * number + 40)[0] for number in range(mapped)]
    assert mapped and flags[-1] & _LAST, "there are more extents than there is room for"
    return sum(bool(each & _SHARED) for each in flags), mapped


@pytest.fixture
async def place() -> AsyncIterator[Path]:
    with state_place() as directory:
        yield directory


def free(path: Path) -> int:
    subprocess.run(["sync", "-f", str(path)], check=True, timeout=60)
    figures = os.statvfs(path)
    return figures.f_bavail * figures.f_frsize


@pytest.mark.parametrize(
    ("make", "reflinks"), [(["mkfs.btrfs", "-q"], True), (["mkfs.ext4", "-q"], False)], ids=["reflinks", "no-reflinks"]
)
async def test_a_clone_of_plain_directories_shares_blocks_where_it_can(
    place: Path, make: list[str], reflinks: bool
) -> None:
    if shutil.which(make[0]) is None:
        pytest.fail(f"{make[0]} is not installed")
    with file_system(place, make) as mount:
        storage = DirStorage(mount / "volumes")
        await storage.open()
        staging = await storage.create()
        content = os.urandom(64 * MIB)
        (staging / "data").write_bytes(content)
        await storage.commit(staging, "containers/101")
        before = free(mount)
        await storage.commit(await storage.clone("containers/101"), "snapshots/101/s")
        taken = before - free(mount)
        clone = storage.path("snapshots/101/s") / "data"
        shared, every = shared_extents(clone)
        assert (shared == every, taken < 8 * MIB) == (reflinks, reflinks)
        assert reflinks or (shared == 0 and taken >= 64 * MIB)
        # Shared or not: what is written to one is not in the other.
        with (storage.path("containers/101") / "data").open("r+b") as original:
            original.write(b"changed")
        assert clone.read_bytes() == content
        await storage.purge()


async def test_a_container_on_plain_directories_with_reflinks(place: Path, own_network: str) -> None:
    """A snapshot of a running one and a copy share its blocks; the restore brings the files back."""
    with file_system(place, ["mkfs.btrfs", "-q"]) as mount:
        state = mount / "state"
        state.mkdir(mode=0o711)
        async with open_node(make_config(state, own_network, storage="dir")) as node:
            await node.running()
            node.attach("101", "sh", "-c", "dd if=/dev/urandom of=/root/data bs=1M count=32; sync")
            await node.driver.create_snapshot("101", "s")
            await node.driver.copy(node.spec("102"), "101", None)
            snapshot = state / "volumes" / "snapshots" / "101" / "s" / "rootfs/root/data"
            for file in (snapshot, node.rootfs("102") / "root/data"):
                shared, every = shared_extents(file)
                assert shared == every
            node.attach("101", "rm", "/root/data")
            await node.driver.stop("101", 0, force=True)
            await node.driver.restore_snapshot("101", "s")
            assert (node.rootfs() / "root/data").stat().st_size == 32 * MIB
            await node.driver.start("101")
            await node.driver.start("102")
        state.rmdir()
