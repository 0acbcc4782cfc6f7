"""Figures, limits and interfaces of real containers, and what sampling a hundred of them costs."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.cgroups import Cgroups, ContainerCgroup
from agent.metrics.containers import ContainerSampler
from common.clock import SystemClock
from common.options import parse_config
from common.reports import ContainerSample

pytestmark = pytest.mark.lxc
ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024
CARD = "00:16:3e:00:00:07"
CONFIG = {
    "limits.memory": "64MiB",
    "limits.processes": "20",
    "limits.cpus": "1",
    "limits.cpu.allowance": "10ms/50ms",
}
SAMPLER = """
import sys
import msgspec
from agent.cgroups import Cgroups
from agent.metrics.containers import ContainerSampler
from common.clock import SystemClock
from common.options import parse_config

sampler = ContainerSampler(Cgroups.detect(), SystemClock())
while line := sys.stdin.readline():
    pid, cgroup, config = msgspec.json.decode(line, type=tuple[int | None, str, dict[str, str]])
    sample = sampler.sample("101", pid, cgroup, parse_config(config), (1, None))
    print(msgspec.json.encode(sample).decode(), flush=True)
sampler.close()
"""


def command(*arguments: str) -> str:
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=30)
    return done.stdout


class Container:
    """A container with busybox, its limits in an outer cgroup, in a network namespace of this test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.space = f"vzt-{secrets.token_hex(4)}"
        self.relative = f"{self.space}/101"
        self.cgroups = Cgroups.detect()
        self.enter = ["nsenter", f"--net=/run/netns/{self.space}"]
        self.pid: int | None = None
        command("ip", "netns", "add", self.space)
        command(*self.enter, "ip", "link", "add", "br0", "type", "bridge")
        self.cgroups.prepare(self.space)
        self.sampler = subprocess.Popen(
            [*self.enter, sys.executable, "-c", SAMPLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    @property
    def cgroup(self) -> ContainerCgroup:
        return self.cgroups.container(self.relative)

    def start(self, script: str, config: dict[str, str]) -> None:
        rootfs = self.directory / "101/rootfs"
        for name in ("bin", "proc", "sys", "dev", "etc"):
            (rootfs / name).mkdir(parents=True)
        busybox = rootfs / "bin/busybox"
        busybox.write_bytes(Path("/bin/busybox").read_bytes())
        busybox.chmod(0o755)
        (rootfs / "bin/run").write_text(f"#!/bin/busybox sh\n{script}\n")
        (rootfs / "bin/run").chmod(0o755)
        cpus = self.cgroups.cpus()[:1]
        lines = [
            ("lxc.uts.name", "web1"),
            ("lxc.rootfs.path", f"dir:{rootfs}"),
            ("lxc.init.cmd", "/bin/run"),
            ("lxc.cgroup.dir.container", self.relative),
            ("lxc.cgroup.dir.container.inner", "inner"),
            ("lxc.cgroup.dir.monitor", f"{self.space}/monitor"),
            ("lxc.net.0.type", "veth"),
            # LXC looks for a bridge in /sys, which shows another network namespace than the one it runs in.
            ("lxc.net.0.script.up", str(self.attach_script())),
            ("lxc.net.0.veth.pair", "vzt101"),
            ("lxc.net.0.hwaddr", CARD),
            ("lxc.net.0.ipv4.address", "10.88.0.77/24"),
            ("lxc.net.0.flags", "up"),
            *self.cgroups.lxc_limits(parse_config(config), cpus, 1000 * MIB),
        ]
        file = self.directory / "101/config"
        file.write_text("".join(f"{key} = {value}\n" for key, value in lines))
        subprocess.run(
            [*self.enter, "lxc-start", "-P", str(self.directory), "-n", "101", "-l", "trace", "-o", "/tmp/lxclog"]
        )
        self.pid = int(self.lxc("lxc-info", "-p", "-H"))

    def attach_script(self) -> Path:
        file = self.directory / "attach"
        file.write_text('#!/bin/sh\nexec ip link set dev "$5" master br0 up\n')
        file.chmod(0o755)
        return file

    def lxc(self, name: str, *arguments: str) -> str:
        # In its namespace: the monitor listens on an abstract socket, which is the namespace's own.
        return command(*self.enter, name, "-P", str(self.directory), "-n", "101", *arguments)

    def sample(self, config: dict[str, str]) -> ContainerSample:
        assert self.sampler.stdin is not None
        assert self.sampler.stdout is not None
        self.sampler.stdin.write(msgspec.json.encode((self.pid, self.relative, config)) + b"\n")
        self.sampler.stdin.flush()
        return msgspec.json.decode(self.sampler.stdout.readline(), type=ContainerSample)

    def remove(self) -> None:
        self.sampler.communicate()
        for pid in self.cgroup.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.cgroup.pids(), "the end of its processes")
        top = self.cgroups.container(self.space)
        wait_until(lambda: not top.pids(), "the end of LXC's monitor")
        wait_until(top.remove, "the end of its cgroups")
        command("ip", "netns", "delete", self.space)


@pytest.fixture
def container() -> Iterator[Container]:
    with tempfile.TemporaryDirectory(prefix="vzt-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        made = Container(Path(directory))
        try:
            yield made
        finally:
            made.remove()


def wait_until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def test_the_figures_of_a_container(container: Container) -> None:
    container.start("busybox sleep 300 & exec busybox sleep 300", CONFIG)
    sample = container.sample(CONFIG)
    assert sample.pid == container.pid
    assert sample.memory_limit == 64 * MIB
    assert sample.memory_usage is not None
    assert 0 < sample.memory_usage < 64 * MIB
    assert sample.processes == 2
    assert sample.started_at == pytest.approx(time.time(), abs=10)
    (card,) = [interface for interface in sample.interfaces if interface.name == "eth0"]
    assert (card.hwaddr, card.up, card.mtu, card.host_name) == (CARD, True, 1500, "vzt101")
    shown = {(entry.family, entry.address, entry.netmask, entry.scope) for entry in card.addresses}
    assert ("inet", "10.88.0.77", "24", "global") in shown
    assert container.cgroup.pids()[0] == container.pid


def test_the_load_is_of_the_quota(container: Container) -> None:
    container.start("while :; do :; done", CONFIG)
    container.sample(CONFIG)
    time.sleep(1.5)  # the interval that is measured
    load = container.sample(CONFIG).cpu_load
    assert load is not None
    # It takes all of its 20 % of one CPU, unless the machine is very busy: never more.
    assert 0.5 < load <= 1.0


def test_limits_change_while_it_runs(container: Container) -> None:
    container.start("exec busybox sleep 300", {})
    assert container.sample({}).memory_limit is None
    cpus = container.cgroups.cpus()
    container.cgroup.set_memory(32 * MIB)
    container.cgroup.set_cpus(cpus[-1:])
    container.cgroup.set_processes(7)
    assert container.sample({}).memory_limit == 32 * MIB
    assert container.pid is not None
    assert os.sched_getaffinity(container.pid) == set(cpus[-1:])
    container.cgroup.set_memory(None)
    container.cgroup.set_cpus(None)
    assert container.sample({}).memory_limit is None
    assert os.sched_getaffinity(container.pid) == set(cpus)


def test_frozen_and_not(container: Container) -> None:
    container.start("exec busybox sleep 300", {})
    assert not container.cgroup.frozen()
    container.lxc("lxc-freeze")
    assert container.cgroup.frozen()
    container.lxc("lxc-unfreeze")
    assert not container.cgroup.frozen()


def test_a_container_that_ended(container: Container) -> None:
    container.start("exec busybox sleep 300", {})
    assert container.sample({}).interfaces != ()
    container.lxc("lxc-stop", "-k")
    assert container.sample({}) == ContainerSample(id="101", disk_usage=1)
    # Nothing of ours kept its network namespace alive: the host's end of the link is gone too.
    wait_until(lambda: "vzt101" not in command(*container.enter, "ip", "link"), "the end of the link")


def test_sampling_a_hundred_takes_little() -> None:
    name = f"vzt-{secrets.token_hex(4)}"
    cgroups = Cgroups.detect()
    processes = [subprocess.Popen(["unshare", "--net", "sleep", "60"]) for _ in range(100)]
    sampler = ContainerSampler(cgroups, SystemClock())
    own = Path("/proc/self/ns/net").stat().st_ino
    try:
        for number, process in enumerate(processes):
            relative = f"{name}/{number}"
            cgroups.prepare(relative)
            for directory in cgroups.container(relative).directories():
                (directory / "inner").mkdir(parents=True, exist_ok=True)
            wait_until(lambda p=process: Path(f"/proc/{p.pid}/ns/net").stat().st_ino != own, "its namespace")  # type: ignore[misc]
        settings = parse_config(CONFIG)

        def batch() -> int:
            taken = [sampler.sample(str(n), p.pid, f"{name}/{n}", settings, (1, 2)) for n, p in enumerate(processes)]
            return sum(1 for sample in taken if sample.interfaces and sample.memory_usage is not None)

        assert batch() == 100
        begun = time.process_time()
        for _ in range(5):
            assert batch() == 100
        taken = (time.process_time() - begun) / 5
        print(f"100 containers every 5 s: {taken * 1000:.1f} ms of CPU time, {taken / 5:.2%} of a core")
        assert taken < 0.02 * 5
    finally:
        sampler.close()
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        assert cgroups.container(name).remove()
