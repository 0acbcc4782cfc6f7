"""Real containers live, die, reboot and are handled by hand; the driver sees it, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from agent.cgroups import Cgroups
from agent.drivers.lxc import commands
from common.errors import Conflict, DeadlinePassed, DriverFailed, NotFound
from common.states import Status
from tests.helpers.busybox import busybox_archive, with_files
from tests.lxc.conftest import Node, leftovers, until

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(120)]
DEAF = b"#!/bin/sh\ntrap '' PWR TERM HUP INT\nwhile :; do sleep 1; done\n"


def cgroups_of(node: Node, id: str) -> list[Path]:
    base = Cgroups.detect().container(f"{node.config.cgroup}/{id}").directories()
    monitors = Cgroups.detect().container(f"{node.config.cgroup}/.monitor/{id}").directories()
    return [path for path in (*base, *monitors) if path.exists()]


async def test_it_is_unprivileged_and_has_its_limits_outside(node: Node) -> None:
    pid = await node.running(limits__memory="64MiB", limits__processes="40")
    assert Path(f"/proc/{pid}").stat().st_uid == node.config.first_id
    places = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    assert all(line.endswith(f"/{node.config.cgroup}/101/ns") for line in places), places
    inside = node.attach("101", "sh", "-c", "cat /proc/self/uid_map; hostname; cat /etc/hostname")
    assert inside.stdout.split() == ["0", "1000000", "65536", "host-101", "host-101"]


async def test_it_gets_its_address(node: Node) -> None:
    await node.running()

    def address() -> bool:
        sample = node.driver.sample(["101"])[0]
        found = [one.address for card in sample.interfaces for one in card.addresses if one.scope == "global"]
        return any(text.startswith("10.91.7.") for text in found)

    await until(address)


async def test_a_death_is_heard_at_once(node: Node) -> None:
    pid = await node.running()
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: node.heard, timeout=2)
    assert time.monotonic() - begun < 2
    report, gone = node.heard[0]
    assert (report.id, report.status, gone) == ("101", Status.STOPPED, False)
    assert cgroups_of(node, "101") == []
    await node.driver.start("101")


async def test_a_reboot_from_inside_is_followed(node: Node) -> None:
    pid = await node.running()
    node.attach("101", "reboot", "-f")
    again = await until(lambda: _pid_other_than(node, pid))
    # LXC's child becomes the container's init only when it has set everything up.
    await until(lambda: Path(f"/proc/{again}").stat().st_uid == node.config.first_id)
    await until(lambda: node.heard, timeout=2)
    assert node.heard[-1][0].status == Status.RUNNING
    await node.driver.stop("101", 30, force=False)
    assert (await node.driver.inspect("101")).status == Status.STOPPED


async def _pid_other_than(node: Node, pid: int) -> int | None:
    now = (await node.driver.inspect("101")).pid
    return now if now != pid else None


def by_hand(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


def interfaces() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True, timeout=10).stdout


async def test_hands_on_the_host_are_noticed(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    place = ["-P", str(node.config.state / "lxc"), "-n", "101"]
    by_hand("lxc-start", *place, "-d")
    await until(lambda: node.heard, timeout=2)
    assert node.heard[-1][0].status == Status.RUNNING
    by_hand("lxc-stop", *place, "-k")
    await until(lambda: node.heard[-1][0].status == Status.STOPPED, timeout=2)
    shutil.rmtree(node.config.state / "lxc/101")
    await until(lambda: node.heard[-1][1], timeout=2)
    assert await node.driver.containers() == []


async def test_an_unmanaged_container_is_shown_and_left_alone(node: Node) -> None:
    (node.config.state / "lxc/byhand").mkdir()
    (node.config.state / "lxc/byhand/config").write_text("lxc.rootfs.path = dir:/nonexistent\n")
    reports = await node.driver.containers()
    assert [(report.id, report.generation, report.status) for report in reports] == [("byhand", 0, Status.STOPPED)]
    with pytest.raises(Conflict):
        await node.driver.create(node.spec("byhand"), None)
    with pytest.raises(NotFound):
        await node.driver.inspect("byhand")
    # What failed so can be deleted, and that touches nothing.
    await node.driver.delete("byhand", force=True)
    assert (node.config.state / "lxc/byhand/config").exists()


async def test_freezing_by_hand_is_noticed_and_by_command_is_no_news(node: Node) -> None:
    await node.running()
    await node.driver.freeze("101")
    await node.driver.unfreeze("101")
    place = ["-P", str(node.config.state / "lxc"), "-n", "101"]
    by_hand("lxc-freeze", *place)
    await until(lambda: node.heard)
    assert [report.status for report, _ in node.heard] == [Status.FROZEN]
    by_hand("lxc-unfreeze", *place)
    await until(lambda: len(node.heard) == 2)
    assert node.heard[-1][0].status == Status.RUNNING


async def test_a_deaf_init_outlives_a_graceful_stop(node: Node) -> None:
    image = await node.have_image(archive=with_files(busybox_archive(), {"sbin/init": (0o755, DEAF)}))
    await node.driver.create(node.spec(), image)
    await node.driver.start("101")
    with pytest.raises(DeadlinePassed):
        await node.driver.stop("101", 0.5, force=False)
    assert (await node.driver.inspect("101")).status == Status.RUNNING
    stopping = asyncio.ensure_future(node.driver.stop("101", 60, force=False))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    await node.driver.stop("101", 10, force=True)
    assert (await node.driver.inspect("101")).status == Status.STOPPED
    assert node.heard == []


async def test_a_frozen_container_can_be_stopped_by_force(node: Node) -> None:
    await node.running()
    await node.driver.freeze("101")
    await node.driver.stop("101", 10, force=True)
    assert cgroups_of(node, "101") == []


async def test_a_container_without_its_monitor_can_be_stopped(node: Node) -> None:
    pid = await node.running()
    monitor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(monitor, signal.SIGKILL)
    await node.driver.stop("101", 10, force=True)
    assert cgroups_of(node, "101") == []
    await node.driver.start("101")


async def test_a_failed_start_says_why_and_leaves_nothing(node: Node) -> None:
    await node.driver.create(node.spec(), None)
    with pytest.raises(DriverFailed, match="101 does not start"):
        await node.driver.start("101")
    image = await node.have_image(archive=with_files(busybox_archive(), {"sbin/init": (0o755, b"#!/nonexistent\n")}))
    await node.driver.create(node.spec("102"), image)
    with pytest.raises(DriverFailed, match="init"):
        await node.driver.start("102")
    assert cgroups_of(node, "101") + cgroups_of(node, "102") == []
    assert "vz" not in interfaces().replace("vztbr0", "")


async def test_a_cancelled_start_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.driver.create(node.spec(), node.image)
    gate = node.config.state / "gate"
    os.mkfifo(gate)
    host = node.driver._parts.host
    lines = host.lines
    held = ("lxc.hook.start-host", f"/bin/cat {gate}")  # lxc-start waits for it, cgroups and cables made
    monkeypatch.setattr(host, "lines", lambda record: [*lines(record), held])
    starting = asyncio.ensure_future(node.driver.start("101"))
    try:
        await until(lambda: cgroups_of(node, "101"))
        starting.cancel()
        await asyncio.sleep(0)
        os.close(os.open(gate, os.O_WRONLY))
        with pytest.raises(asyncio.CancelledError):
            await starting
    finally:
        gate.unlink()
    assert (await node.driver.inspect("101")).status == Status.STOPPED
    assert cgroups_of(node, "101") == []


async def test_limits_change_at_once_or_not_at_all(node: Node) -> None:
    await node.running(limits__memory="64MiB", limits__cpus="1")
    cgroup = Cgroups.detect().container(f"{node.config.cgroup}/101")
    changed = {"limits__memory": "96MiB", "limits__processes": "60", "limits__cpu__allowance": "50ms/100ms"}
    await node.driver.update(node.spec(**changed, limits__disk="200MiB"))
    sample = node.driver.sample(["101"])[0]
    assert (sample.memory_limit, sample.disk_limit) == (96 * 2**20, 200 * 2**20)
    with pytest.raises(Exception, match=r"disk|take|bytes"):
        await node.driver.update(node.spec(**changed, limits__disk="1MiB"))
    assert (await node.driver.inspect("101")).config["limits.disk"] == "200MiB"
    assert cgroup.figures().memory_limit == 96 * 2**20


async def test_a_copy_into_less_than_its_files_take_is_refused(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    (node.rootfs() / "root/big").write_bytes(os.urandom(3 * 2**20))
    await node.driver.create_snapshot("101", "s")  # commits the pool: what it uses is known then
    await until(lambda: (node.driver.sample(["101"])[0].disk_usage or 0) > 3 * 2**20, timeout=60)
    for snapshot in (None, "s"):
        with pytest.raises(Conflict, match="take"):
            await node.driver.copy(node.spec("102", limits__disk="1MiB"), "101", snapshot)
        assert [report.id for report in await node.driver.containers()] == ["101"]
    await node.driver.copy(node.spec("102", limits__disk="60MiB"), "101", "s")


async def test_limits_hold_inside(node: Node) -> None:
    await node.running(limits__memory="32MiB", limits__processes="30", limits__disk="60MiB")
    eat = node.attach("101", "sh", "-c", "dd if=/dev/zero of=/dev/null bs=100M count=1")
    assert eat.returncode != 0, "100 MB in a limit of 32"
    fork = node.attach("101", "sh", "-c", "for i in $(seq 60); do sleep 5 & done; wait", timeout=60)
    assert "can't fork" in fork.stderr
    fill = node.attach("101", "dd", "if=/dev/urandom", "of=/root/big", "bs=1M", "count=100", "conv=fsync")
    assert fill.returncode != 0
    assert (node.rootfs() / "root/big").stat().st_size < 60 * 2**20


async def test_the_name_changes_while_it_runs(node: Node) -> None:
    await node.running()
    await node.driver.update(node.spec(hostname="-other.name_1"))
    assert node.attach("101", "hostname").stdout.strip() == "-other.name_1"
    assert (node.rootfs() / "etc/hostname").read_text() == "-other.name_1\n"


async def test_privileged_comes_and_goes_with_its_files(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    await node.driver.create_snapshot("101", "one")
    await node.driver.update(node.spec(security__privileged="true"))
    assert (node.rootfs() / "bin/busybox").stat().st_uid == 0
    await node.driver.start("101")
    pid = (await node.driver.inspect("101")).pid
    assert Path(f"/proc/{pid}").stat().st_uid == 0
    await node.driver.stop("101", 30, force=True)
    await node.driver.update(node.spec())
    await node.driver.restore_snapshot("101", "one")
    assert (node.rootfs() / "bin/busybox").stat().st_uid == node.config.first_id
    await node.driver.start("101")


async def test_shut_down_takes_everything_and_keeps_the_data(node: Node) -> None:
    await node.running()
    await node.driver.freeze("101")
    await node.driver.shut_down()
    left = [thing for thing in leftovers(node.config) if not thing.startswith("file ")]
    assert left == []
    await node.driver.open(node.hear)
    assert (await node.driver.inspect("101")).status == Status.STOPPED
    await node.driver.start("101")


async def test_an_address_of_a_container_that_a_crash_prevented_is_given_back(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    hosts = node.config.state / "dhcp" / "hosts"
    (kept,) = hosts.iterdir()
    (hosts / "00-16-3e-aa-aa-aa").write_text("00:16:3e:aa:aa:aa,10.91.7.77,gone\n")
    await node.driver.close()
    await node.driver.open(node.hear)
    assert list(hosts.iterdir()) == [kept]


async def test_a_rename_that_a_crash_cut_short_can_be_undone(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    await node.driver.create_snapshot("101", "s")
    pool = node.config.state / "pool"
    # The volumes have the new name, the record still has the old one.
    for kind in ("containers", "snapshots"):
        (pool / kind / "101").rename(pool / kind / "102")
    await node.driver.close()
    await node.driver.open(node.hear)
    await node.driver.rename("102", node.spec())
    await node.driver.start("101")
    assert [one.name for one in (await node.driver.inspect("101")).snapshots] == ["s"]


async def test_a_container_with_a_damaged_record_is_not_taken_for_deleted(node: Node) -> None:
    await node.running()
    (node.config.state / "lxc" / "101" / "vzfleet.json").write_text('{"spec"')
    await node.driver.close()
    await node.driver.open(node.hear)
    with pytest.raises(DriverFailed, match="damaged"):
        await node.driver.delete("101", force=True)
    assert [(one.id, one.status) for one in await node.driver.containers()] == [("101", Status.RUNNING)]


async def test_a_shut_down_ends_what_was_started_by_hand_too(node: Node) -> None:
    directory = node.config.state / "lxc"
    await node.driver.create(node.spec("model"), node.image)
    (directory / "byhand").mkdir()
    config = (directory / "model/config").read_text().replace("/model", "/byhand")
    root = f'lxc.rootfs.path = "dir:{node.config.state / "pool/containers/model/rootfs"}"'
    lines = [root if line.startswith("lxc.rootfs.path") else line for line in config.splitlines()]
    kept = [line for line in lines if not line.startswith(("lxc.net", "lxc.cgroup"))]
    (directory / "byhand/config").write_text("\n".join(kept) + "\n")
    by_hand("lxc-start", "-P", str(directory), "-n", "byhand", "-d")
    assert await commands.state(directory, "byhand") == "RUNNING"
    await node.driver.shut_down()
    assert await commands.state(directory, "byhand") == "STOPPED"
