"""The busybox image as a system container: DHCP, a quick and clean way down, no zombies, no wasted CPU."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controller.images.builders import BusyboxBuilder
from controller.images.files import ImageFiles
from tests.helpers.image_machine import ADDRESS, GATEWAY, Machine, image_machine, until

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(120)]


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    """A machine with a started busybox container."""
    files = ImageFiles(tmp_path)
    built = await BusyboxBuilder().build({"os": "busybox"}, files, lambda stage, percent: None)
    image = await files.keep(built.staged)
    async with image_machine() as machine:
        await machine.unpack(image)
        await machine.start("SIGPWR")
        yield machine


def cpu_ticks(machine: Machine) -> int:
    """CPU time of init and of all children it has waited for, in clock ticks (proc(5), stat)."""
    fields = Path(f"/proc/{machine.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15])


async def test_it_gets_its_address_route_and_name_server(machine: Machine) -> None:
    await until(machine.has_address, timeout=20)
    await until(lambda: (machine.state / "c/rootfs/etc/resolv.conf").exists(), timeout=20)
    assert f"default via {GATEWAY} dev eth0" in (await machine.attach("ip", "route")).output
    resolver = (await machine.attach("cat", "/etc/resolv.conf")).output
    assert resolver == f"search containers.test\nnameserver {GATEWAY}\n"
    assert ADDRESS in (await machine.attach("ip", "-4", "address", "show", "dev", "eth0")).output
    lease = (machine.state / "leases").read_text()
    assert " image-test " in lease, "it sends its own name"


async def test_it_stops_at_once_and_lets_processes_end_in_order(machine: Machine) -> None:
    await until(machine.has_address, timeout=20)
    script = "trap 'echo ended > /root/proof; exit 0' TERM; touch /root/ready; while :; do sleep 1; done"
    await machine.attach("sh", "-c", f"({script}) >/dev/null 2>&1 </dev/null &")
    root = machine.state / "c/rootfs/root"
    await until(lambda: (root / "ready").exists(), timeout=10)
    begun = time.monotonic()
    await machine.lxc("stop", "--nokill", "-t", "20", timeout=30)
    took = time.monotonic() - begun
    assert await machine.state_name() == "STOPPED"
    assert (root / "proof").read_text() == "ended\n"
    assert took < 2, f"stopping took {took:.2f} s; busybox's own init takes 2.5 s"


async def test_a_process_that_does_not_listen_is_killed(machine: Machine) -> None:
    await until(machine.has_address, timeout=20)
    await machine.attach("sh", "-c", "(trap '' TERM; while :; do sleep 1; done) >/dev/null 2>&1 </dev/null &")
    await machine.lxc("stop", "--nokill", "-t", "30", timeout=40)
    assert await machine.state_name() == "STOPPED"


async def test_orphans_are_reaped_and_it_idles(machine: Machine) -> None:
    await until(machine.has_address, timeout=20)
    await machine.attach("sh", "-c", "for n in 1 2 3 4 5; do (sleep 0.01 &) ; done")
    before = cpu_ticks(machine)
    await asyncio.sleep(1.5)  # The time over which CPU use is measured.
    assert cpu_ticks(machine) - before <= 2
    processes = (await machine.attach("ps", "-o", "pid,stat,comm")).output
    assert " Z" not in processes, processes


async def test_the_dhcp_client_comes_back_when_it_dies(machine: Machine) -> None:
    await until(machine.has_address, timeout=20)
    await machine.attach("killall", "udhcpc")
    await until(lambda: not machine.has_address() or (machine.state / "leases").exists(), timeout=10)
    running = False
    for _ in range(100):
        running = (await machine.attach("pidof", "udhcpc", check=False)).code == 0
        if running:
            break
        await asyncio.sleep(0.1)
    assert running
    await until(machine.has_address, timeout=20)
