"""Containers travel between two nodes: all that a file system may hold, in rounds, with cuts, in both formats."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.channel.base import Restarted
from common.errors import Conflict, InvalidRequest, NotFound, Unavailable, Unsupported
from common.states import Status
from tests.helpers.trees import describe, difference
from tests.helpers.two_nodes import MIB, OneNode, TwoNodes, spec, two_real_nodes
from tests.lxc import conftest as machine

own_network = machine.own_network
state_directory = machine.state_directory
pytestmark = [pytest.mark.lxc, pytest.mark.timeout(180)]
OWN = ("etc/hostname", "etc/machine-id")
"""What a copy has of its own."""
CAP_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")
WAYS = ("btrfs-btrfs", "btrfs-dir", "dir-btrfs", "dir-dir")


@pytest.fixture(params=WAYS)
async def nodes(request: pytest.FixtureRequest, state_directory: Path, own_network: str) -> AsyncIterator[TwoNodes]:
    source, _, target = request.param.partition("-")
    async with two_real_nodes(state_directory, own_network, source, target) as made:
        yield made


@pytest.fixture
async def on_btrfs(state_directory: Path, own_network: str) -> AsyncIterator[TwoNodes]:
    async with two_real_nodes(state_directory, own_network, "btrfs", "btrfs") as made:
        yield made


async def make(node: OneNode, id: str = "101", **config: str) -> Path:
    """A container with a machine-id; its root directory."""
    image = await node.have_image()
    await node.driver.create(spec(id, **config), image)
    root = node.rootfs(id)
    own(node, root / "etc/machine-id", b"ab" * 16 + b"\n")
    return root


def own(node: OneNode, path: Path, content: bytes = b"", user: int = 0) -> Path:
    """A file of the container's user, made from outside."""
    path.write_bytes(content)
    os.chown(path, node.config.first_id + user, node.config.first_id + user)
    return path


def fill(node: OneNode, home: Path) -> None:
    """Everything that a file system may hold for an unprivileged container."""
    first = node.config.first_id
    own(node, home / "data", os.urandom(3 * MIB))
    os.link(home / "data", home / "linked")
    own(node, home / "sparse")
    with (home / "sparse").open("r+b") as sparse:
        sparse.truncate(64 * MIB)
        sparse.seek(20 * MIB)
        sparse.write(b"in the middle")
    own(node, home / "setuid", b"#!", user=1000).chmod(0o4755)
    os.setxattr(home / "data", "user.note", b"\0binary\xff")
    acl = bytes.fromhex("02000000 01000600ffffffff 02000400") + (first + 5).to_bytes(4, "little")
    acl += bytes.fromhex("04000400ffffffff 10000400ffffffff 20000000ffffffff")
    os.setxattr(home / "setuid", "system.posix_acl_access", acl)
    own(node, home / "capable")
    capability = b"\1\0\0\3" + CAP_NET_RAW[4:20] + first.to_bytes(4, "little")
    os.setxattr(home / "capable", "security.capability", capability)
    (home / "symlink").symlink_to("/etc/../etc/passwd")
    os.mkfifo(home / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "socket"))
    os.mknod(home / "whiteout", 0o020644, os.makedev(0, 0))
    odd = os.fsencode(home) + b"/odd\n\xff\\name\t'\""
    Path(os.fsdecode(odd)).write_bytes(b"odd")
    for path in home.iterdir():
        if path.name not in ("setuid", "capable"):
            os.chown(path, first, first, follow_symlinks=False)
    os.utime(home / "data", ns=(1, 1_600_000_000_123_456_789))
    deep(node, home / "deep", 1000)


def deep(node: OneNode, start: Path, levels: int) -> None:
    start.mkdir()
    os.chown(start, node.config.first_id, node.config.first_id)
    descriptor = os.open(start, os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=descriptor)
        os.chown("d", node.config.first_id, node.config.first_id, dir_fd=descriptor)
        below = os.open("d", os.O_DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)


def same(one: OneNode, before: Path, other: OneNode, after: Path, but: tuple[str, ...] = ()) -> str:
    return difference(describe(before, one.config.first_id), describe(after, other.config.first_id), but)


async def test_what_changed_under_its_old_time_is_taken_as_well(nodes: TwoNodes) -> None:
    """As a store into a mapped page does that another one had made dirty before."""
    source, target = nodes.source, nodes.target
    file = await make(source) / "root/mapped"
    await nodes.round(spec("101", generation=2), 0, last=False)
    own(source, file, b"first")
    time = file.stat().st_mtime_ns
    await nodes.round(spec("101", generation=2), 1, last=False)
    own(source, file, b"later")
    os.utime(file, ns=(time, time))
    await nodes.round(spec("101", generation=2), 2)
    there = target.rootfs("101") / "root/mapped"
    assert (there.read_bytes(), there.stat().st_mtime_ns) == (b"later", time)


async def test_a_move_in_three_rounds(nodes: TwoNodes) -> None:
    source, target = nodes.source, nodes.target
    root = await make(source)
    home = root / "root"
    fill(source, home)
    for name in ("one", "two"):
        own(source, home / name, name.encode())
        await source.driver.create_snapshot("101", name)
    await source.driver.start("101")
    taken = (await source.driver.inspect("101")).snapshots
    moved = spec("101", generation=2)
    await nodes.round(moved, 0, last=False, with_snapshots=True)
    own(source, home / "new", os.urandom(MIB))
    (home / "one").unlink()
    (home / "linked").rename(home / "renamed")
    await nodes.round(moved, 1, last=False, with_snapshots=True)
    with pytest.raises(NotFound):
        await target.driver.inspect("101")
    own(source, home / "data", b"overwritten")
    (home / "deep/d").rename(home / "deep/moved")
    with pytest.raises(Conflict):
        await nodes.round(moved, 2, with_snapshots=True)
    await source.driver.stop("101", 30, force=True)
    await nodes.round(moved, 2, with_snapshots=True)
    report = await target.driver.inspect("101")
    assert (report.generation, report.status, report.snapshots) == (2, Status.STOPPED, taken)
    assert same(source, root, target, target.rootfs("101")) == "", "machine-id and all"
    for name in ("one", "two"):
        assert same(source, source.snapshot("101", name), target, target.snapshot("101", name)) == ""
    await nodes.round(moved, 2, with_snapshots=True)
    await target.driver.start("101")
    assert [stage for stage, *_ in nodes.reported] != []
    await nodes.end()
    await target.driver.delete("101", force=True)
    assert list((target.pool / "snapshots").iterdir()) == []


async def test_a_running_container_and_its_snapshot_are_copied(nodes: TwoNodes) -> None:
    source, target = nodes.source, nodes.target
    root = await make(source)
    fill(source, root / "root")
    await source.driver.create_snapshot("101", "old")
    own(source, root / "root/later", b"later")
    await source.driver.start("101")
    await nodes.round(spec("102"), moving=False, with_snapshots=True)
    assert (await source.driver.inspect("101")).status == Status.RUNNING
    await source.driver.stop("101", 30, force=True)
    assert same(source, root / "root", target, target.rootfs("102") / "root") == ""
    assert (target.rootfs("102") / "etc/hostname").read_text() == "host-102\n"
    ids = {(each / "etc/machine-id").read_bytes() for each in (root, target.rootfs("102"))}
    assert len(ids) == 2, "a copy has a machine-id of its own"
    assert [one.name for one in (await target.driver.inspect("102")).snapshots] == ["old"]
    await nodes.end()
    nodes.begin_another()
    await nodes.round(spec("103"), moving=False, snapshot="old")
    assert same(source, source.snapshot("101", "old"), target, target.rootfs("103"), OWN) == ""
    assert (await target.driver.inspect("103")).snapshots == ()
    await nodes.end()


async def test_one_that_is_there_is_refreshed(nodes: TwoNodes) -> None:
    nodes.format = "files"
    source, target = nodes.source, nodes.target
    root = await make(source)
    fill(source, root / "root")
    await source.driver.create_snapshot("101", "s")
    there = await make(target, "102", limits__memory="64MiB")
    own(target, there / "etc/machine-id", b"cd" * 16 + b"\n")
    own(target, there / "root/only here")
    await target.driver.create_snapshot("102", "mine")
    before = await target.driver.inspect("102")
    refreshed = spec("102", limits__memory="64MiB")
    await target.driver.start("102")
    with pytest.raises(Conflict):
        await nodes.round(refreshed, moving=False, refresh=True)
    await target.driver.stop("102", 30, force=True)
    with pytest.raises(Restarted):
        await nodes.round(refreshed, moving=False, refresh=True, cut=MIB)
    assert (there / "root/only here").exists(), "it keeps its own until it has all"
    await nodes.round(refreshed, moving=False, refresh=True, with_snapshots=True)
    after = await target.driver.inspect("102")
    assert (after.hostname, after.hwaddr, after.config) == (before.hostname, before.hwaddr, before.config)
    assert {one.name for one in after.snapshots} == {"mine", "s"}
    assert same(source, root, target, there, OWN) == ""
    assert (there / "etc/hostname").read_text() == "host-102\n"
    assert (there / "etc/machine-id").read_bytes() == b"cd" * 16 + b"\n"
    nodes.begin_another()
    one, other = await nodes.round(refreshed, moving=False, refresh=True, with_snapshots=True)
    assert one.sent + other.sent < MIB, "only the difference travels"
    await target.driver.start("102")
    await target.driver.stop("102", 30, force=True)
    with pytest.raises(NotFound):
        await nodes.round(spec("none"), moving=False, refresh=True)
    await nodes.end()


@pytest.mark.parametrize("nodes", ["btrfs-btrfs", "dir-dir"], indirect=True)
@pytest.mark.parametrize("cut", [{"cut": 10}, {"cut_back": 3}, {"cut": 2 * MIB}, {"cut": 7 * MIB}, {"cut_back": 30}])
async def test_after_a_cut_it_goes_on(nodes: TwoNodes, cut: dict[str, int]) -> None:
    source, target = nodes.source, nodes.target
    root = await make(source)
    own(source, root / "root/first", os.urandom(3 * MIB))
    await source.driver.create_snapshot("101", "s")
    own(source, root / "root/second", os.urandom(6 * MIB))
    for last in (False, True):
        with contextlib.suppress(Restarted):
            await nodes.round(spec("101"), int(last), last=last, with_snapshots=True, **cut)
        one, _ = await nodes.round(spec("101"), int(last), last=last, with_snapshots=True)
        if cut.get("cut") == 7 * MIB and not last:
            assert one.sent < 7 * MIB, "the snapshot is not sent again"
        own(source, root / "root/third", b"more")
        if last:
            (root / "root/third").unlink()
    (target.rootfs("101") / "root/third").unlink(missing_ok=True)
    assert same(source, root, target, target.rootfs("101"), ("root",)) == ""
    await nodes.end()


@pytest.mark.parametrize("nodes", ["btrfs-btrfs", "dir-dir"], indirect=True)
async def test_given_up_in_the_middle_it_leaves_no_process(nodes: TwoNodes) -> None:
    root = await make(nodes.source)
    own(nodes.source, root / "root/data", os.urandom(24 * MIB))
    task = asyncio.ensure_future(nodes.round(spec("101"), last=False))
    await machine.until(lambda: nodes.reported)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    programs = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    assert [program for program in programs if b"rsync" in program or b"btrfs" in program] == []
    await nodes.round(spec("101"))
    assert same(nodes.source, root, nodes.target, nodes.target.rootfs("101")) == ""
    await nodes.end()


async def test_what_failed_leaves_nothing(nodes: TwoNodes) -> None:
    source, target = nodes.source, nodes.target
    root = await make(source)
    own(source, root / "root/data", os.urandom(3 * MIB))
    await source.driver.create_snapshot("101", "s")
    before = sorted(path.name for kind in ("containers", "snapshots") for path in (target.pool / kind).iterdir())
    await nodes.round(spec("101"), 0, last=False, with_snapshots=True)
    with pytest.raises(Unavailable):
        await nodes.round(spec("101"), 1, with_snapshots=True, cut=5)
    for node in (source, target):
        await node.driver.end_transfer(nodes.transfers[0])
    await target.driver.delete("101", force=True)
    assert sorted(p.name for kind in ("containers", "snapshots") for p in (target.pool / kind).iterdir()) == before
    assert (source.kept(), target.kept()) == ([], [])
    assert (root / "root/data").stat().st_size == 3 * MIB


async def test_device_nodes_are_refused(nodes: TwoNodes) -> None:
    root = await make(nodes.source)
    (root / "dev").mkdir(exist_ok=True)
    os.mknod(root / "dev/evil", 0o060600, os.makedev(7, 0))
    with pytest.raises(InvalidRequest, match=r"device node.*dev/evil"):
        await nodes.round(spec("101"), moving=False)
    assert await nodes.target.driver.containers() == []
    await nodes.end()


@pytest.mark.parametrize("way", ["btrfs-btrfs", "dir-dir"])
async def test_ids_are_those_inside(state_directory: Path, own_network: str, way: str) -> None:
    source, _, target = way.partition("-")
    made = two_real_nodes(state_directory, own_network, source, target, first_id=2_000_000, format="files")
    async with made as nodes:
        root = await make(nodes.source)
        home = root / "root"
        fill(nodes.source, home)
        for path, name in ((home / "setuid", "system.posix_acl_access"), (home / "capable", "security.capability")):
            os.removexattr(path, name)
        await nodes.round(spec("101"))
        assert same(nodes.source, root, nodes.target, nodes.target.rootfs("101")) == ""
        nodes.format = "btrfs"
        if way == "btrfs-btrfs":
            with pytest.raises(InvalidRequest, match="id map"):
                await nodes.round(spec("102"), moving=False)
        await nodes.end()


async def test_a_privileged_one_stays_so(nodes: TwoNodes) -> None:
    source, target = nodes.source, nodes.target
    image = await source.have_image(privileged=True)
    await source.driver.create(spec("101", security__privileged="true"), image)
    root = source.rootfs("101")
    (root / "root/file").write_bytes(b"x")
    os.chown(root / "root/file", 123, 456)
    await nodes.round(spec("101", security__privileged="true"))
    assert difference(describe(root), describe(target.rootfs("101"))) == ""
    nodes.begin_another()
    nodes.format = "files"
    await nodes.round(spec("102"), moving=False)
    assert (target.rootfs("102") / "root/file").stat().st_uid == target.config.first_id + 123
    await nodes.end()


async def test_subvolumes_inside_are_not_left_out_silently(on_btrfs: TwoNodes) -> None:
    root = await make(on_btrfs.source)
    machine.subprocess.run(["btrfs", "-q", "subvolume", "create", str(root / "inner")], check=True, timeout=10)
    own(on_btrfs.source, root / "inner/file", b"x")
    with pytest.raises(Unsupported, match="subvolumes inside"):
        await on_btrfs.round(spec("101"))
    on_btrfs.format = "files"
    os.chown(root / "inner", on_btrfs.source.config.first_id, on_btrfs.source.config.first_id)
    await on_btrfs.round(spec("101"))
    assert (on_btrfs.target.rootfs("101") / "inner/file").read_bytes() == b"x"
    await on_btrfs.end()


async def test_a_new_agent_sweeps_old_transfers_only(on_btrfs: TwoNodes) -> None:
    await make(on_btrfs.source)
    await on_btrfs.round(spec("101"), last=False)
    for node in (on_btrfs.source, on_btrfs.target):
        await node.driver.close()
        await node.driver.open(lambda report, gone: None)
        assert len(node.kept()) == 1
        os.utime(node.kept()[0], (0, 0))
        await node.driver.close()
        await node.driver.open(lambda report, gone: None)
        assert node.kept() == []
