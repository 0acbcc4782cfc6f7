"""Figures of containers and the node: loads, what is not known, processes that vanish, interfaces by netlink."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cgroups import Cgroups
from agent.metrics import netlink
from agent.metrics.containers import ContainerSampler
from agent.metrics.host import NodeLoad, node_facts, node_memory, sample_node
from agent.metrics.interfaces import InterfaceReader
from agent.metrics.load import Load
from agent.metrics.processes import start_time
from common.clock import ManualClock
from common.options import parse_config
from common.reports import ContainerSample

NOTHING = parse_config({})
DISK = (7, 100)


# ---------------------------------------------------------------- load


def test_a_load_needs_two_points() -> None:
    load = Load()
    assert load.share(10, 1.0, 2) is None
    assert load.share(15, 6.0, 2) == pytest.approx(0.5)
    assert load.share(20, 6.0, 2) == 0
    assert load.share(25, 30.0, 2) == 1


def test_a_sample_in_between_does_not_spoil_the_next() -> None:
    load = Load()
    load.share(10, 0.0, 1)
    assert load.share(15, 5.0, 1) == pytest.approx(1.0)
    # Asked for 0.1 s later, in which nothing was used: over the interval since 10, not over 0.1 s.
    assert load.share(15.1, 5.0, 1) == pytest.approx(5 / 5.1)
    assert load.share(20, 5.0, 1) == 0


def test_too_short_an_interval_is_not_known() -> None:
    load = Load()
    load.start(10, 0.0)
    assert load.share(10.01, 0.01, 1) is None
    assert load.share(10.5, 0.25, 1) == pytest.approx(0.5)


def test_a_counter_that_began_anew() -> None:
    load = Load()
    load.share(10, 100.0, 1)
    assert load.share(15, 1.0, 1) is None
    assert load.share(20, 2.0, 1) == pytest.approx(0.2)


# ---------------------------------------------------------------- a container on plain files


class Fake:
    """A container `n/101` with init 4242 in a /proc and cgroups of plain files."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroup = root / "cgroup/n/101"
        (self.proc / "4242").mkdir(parents=True)
        self.cgroup.mkdir(parents=True)
        (root / "cgroup/cpuset.cpus.effective").write_text("0-3\n")
        self.clock = ManualClock(monotonic=1000.0)
        self.started(400.0)
        self.used(0.0)
        self.sampler = ContainerSampler(Cgroups("v2", unified=root / "cgroup"), self.clock, self.proc)
        self.config: dict[str, str] = {}

    def started(self, seconds: float) -> None:
        ticks = int(seconds * os.sysconf("SC_CLK_TCK"))
        fields = ["S", *["0"] * 18, str(ticks), *["0"] * 30]
        (self.proc / "4242/stat").write_text(f"4242 (a) 99 (evil name) {' '.join(fields)}\n")

    def used(self, seconds: float) -> None:
        (self.cgroup / "cpu.stat").write_text(f"usage_usec {int(seconds * 10**6)}\n")

    def sample(self, pid: int | None = 4242) -> ContainerSample:
        return self.sampler.sample("101", pid, "n/101", parse_config(self.config), DISK)

    def load_of(self, seconds: float, **config: str) -> float | None:
        """The load when `seconds` of CPU are used within the next 10 s."""
        self.config = {key.replace("_", "."): value for key, value in config.items()}
        base = self.sample()
        assert base.cpu_time is not None
        self.clock.advance(10)
        self.used(base.cpu_time / 10**9 + seconds)
        return self.sample().cpu_load


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    made = Fake(tmp_path)
    yield made
    made.sampler.close()


def test_what_is_not_known_is_none(fake: Fake) -> None:
    sample = fake.sample()
    assert (sample.id, sample.pid, sample.disk_usage, sample.disk_limit) == ("101", 4242, 7, 100)
    assert (sample.memory_usage, sample.memory_limit, sample.processes, sample.swap_usage) == (None,) * 4
    assert (sample.cpu_time, sample.cpu_load) == (0, None)
    assert sample.interfaces == ()


def test_a_stopped_container_has_disk_figures_only(fake: Fake) -> None:
    assert fake.sample(pid=None) == ContainerSample(id="101", disk_usage=7, disk_limit=100)


def test_started_at_is_stable(fake: Fake) -> None:
    first = fake.sample().started_at
    assert first == fake.clock.now().timestamp() - 600
    fake.clock.advance(5)
    assert fake.sample().started_at == first


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 0.125),  # of the node's 4 CPUs
        ({"limits_cpus": "1"}, 0.5),
        ({"limits_cpus": "64"}, 0.125),
        ({"limits_cpu_allowance": "50%"}, 0.125),
        ({"limits_cpu_allowance": "50ms/50ms"}, 0.5),
        ({"limits_cpu_allowance": "200ms/100ms", "limits_cpus": "1"}, 0.5),
        ({"limits_cpu_allowance": "10ms/100ms"}, 1.0),
    ],
)
def test_the_load_is_of_what_was_allotted(fake: Fake, config: dict[str, str], expected: float) -> None:
    assert fake.load_of(5.0, **config) == pytest.approx(expected)


def test_a_young_container_has_a_load_at_its_first_sample(fake: Fake) -> None:
    fake.started(990.0)
    fake.used(20.0)
    assert fake.sample().cpu_load == pytest.approx(0.5)


def test_another_start_begins_anew(fake: Fake) -> None:
    fake.used(50.0)
    fake.sample()
    fake.clock.advance(10)
    fake.started(1005.0)
    fake.used(0.0)
    sample = fake.sample()
    assert sample.cpu_load == 0
    assert sample.started_at == fake.clock.now().timestamp() - 5


def test_a_process_that_is_gone(fake: Fake) -> None:
    fake.sample()
    (fake.proc / "4242/stat").unlink()
    assert fake.sample() == ContainerSample(id="101", disk_usage=7, disk_limit=100)


def test_forgotten_containers_leave_no_load(fake: Fake) -> None:
    fake.sample()
    fake.sampler.forget("101")
    fake.sampler.forget("unknown")
    fake.clock.advance(10)
    fake.used(5.0)
    assert fake.sample().cpu_load is None


def test_no_descriptor_is_left_open(fake: Fake) -> None:
    fake.sample()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        fake.sample()
        fake.sample(pid=None)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_start_time_of_a_real_process() -> None:
    own = start_time(os.getpid())
    assert own is not None
    assert 0 < own < float(Path("/proc/uptime").read_text().split()[0])
    child = subprocess.Popen(["true"])
    child.wait()
    assert start_time(child.pid) is None


# ---------------------------------------------------------------- interfaces


@pytest.fixture
def reader() -> Iterator[InterfaceReader]:
    made = InterfaceReader()
    yield made
    made.close()


def test_our_own_namespace_is_not_a_containers(reader: InterfaceReader) -> None:
    assert reader.read(os.getpid()) == ()


def test_interfaces_of_a_process_that_is_gone(reader: InterfaceReader) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert reader.read(child.pid) == ()


def test_interfaces_of_another_namespace(reader: InterfaceReader) -> None:
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")
    here = Path("/proc/self/ns/net").stat().st_ino
    script = "ip link set lo up && ip address add 10.9.8.7/24 dev lo && echo ready && read end"
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        found = reader.read(child.pid)
        child.communicate(b"\n")
    (lo,) = [interface for interface in found if interface.name == "lo"]
    assert (lo.up, lo.mtu, lo.hwaddr, lo.host_name) == (True, 65536, "00:00:00:00:00:00", None)
    shown = {(entry.family, entry.address, entry.netmask, entry.scope) for entry in lo.addresses}
    assert {("inet", "127.0.0.1", "8", "local"), ("inet", "10.9.8.7", "24", "global")} <= shown
    assert Path("/proc/self/ns/net").stat().st_ino == here
    assert all(Path(f"/proc/self/task/{task.native_id}/ns/net").stat().st_ino == here for task in threading.enumerate())


class FakeRoute:
    """Answers a netlink request with given bytes."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)

    def send(self, data: bytes) -> int:
        return len(data)

    def recv(self, size: int) -> bytes:
        return self.answers.pop(0)[:size]


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=LHHLL", 16 + len(body), kind, 2, 1, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


DONE = message(3, bytes(4))
LINK = struct.pack("=BBHiII", 0, 0, 1, 5, 1, 0)


def test_hostile_names_and_missing_attributes() -> None:
    route = FakeRoute(message(16, LINK + attribute(3, b"a\x1b\xff\n\0")) + message(16, LINK) + message(16, b"x"), DONE)
    first, second = netlink.links(route)  # type: ignore[arg-type]
    assert first.name == "a???"
    assert (second.name, second.hwaddr, second.mtu, second.peer, second.counters) == ("", "", 0, None, (0,) * 8)


def test_broken_attributes_end_the_parsing() -> None:
    route = FakeRoute(message(16, LINK + struct.pack("=HH", 2, 3) + b"zzzz"), DONE)
    assert [link.name for link in netlink.links(route)] == [""]  # type: ignore[arg-type]


def test_an_endless_answer_is_cut() -> None:
    many = message(16, LINK) * 1000
    route = FakeRoute(*[many] * 1000)
    assert len(netlink.links(route)) < 30_000  # type: ignore[arg-type]
    assert route.answers


def test_a_refusal_is_an_error() -> None:
    with pytest.raises(PermissionError):
        netlink.links(FakeRoute(message(2, struct.pack("=i", -1))))  # type: ignore[arg-type]


def test_the_address_of_a_point_to_point_link_is_our_end() -> None:
    body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, 5)
    body += attribute(1, bytes([10, 0, 0, 1])) + attribute(2, bytes([10, 0, 0, 2]))
    other = struct.pack("=BBBBI", socket.AF_INET6, 64, 0, 253, 5) + attribute(1, b"short")
    (found,) = netlink.addresses(FakeRoute(message(20, body) + message(20, other), DONE))  # type: ignore[arg-type]
    assert (found.address, found.prefix) == ("10.0.0.2", 32)


# ---------------------------------------------------------------- the node


def test_a_nodes_sample() -> None:
    sample = sample_node((100, 40), NodeLoad())
    assert sample.disk_free == 40
    assert 0 < sample.memory_free <= node_memory()
    assert sample.uptime > 0
    assert sample.cpu_load is None or 0 <= sample.cpu_load <= 1


def test_a_nodes_facts() -> None:
    facts = node_facts(
        driver="fake",
        driver_version="1",
        storage="dir",
        cgroup="v2",
        subnet=None,
        pool=(100, 40),
        capabilities=["x"],
        id_map="1000000:65536",
    )
    assert (facts.disk, facts.driver, facts.cgroup, facts.capabilities) == (100, "fake", "v2", ("x",))
    assert facts.id_map == "1000000:65536"
    assert facts.cpus >= 1
    assert facts.memory > 2**20
