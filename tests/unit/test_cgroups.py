"""Cgroups: what is mounted, figures and limits on trees of plain files, and on real cgroups of this machine."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.cgroups import Cgroups, ContainerCgroup, Figures, Moves
from agent.cgroups.files import format_cpus, parse_cpus, read_number, read_text, remove_tree, walk
from common.errors import DriverFailed, Unsupported
from common.options import parse_allowance, parse_config

MIB = 1024 * 1024


def fake_proc(tmp_path: Path, mounts: list[tuple[str, str, str, str]], homes: str, own: str = "") -> Path:
    """A /proc with mounts of (root, point, type, options), init's cgroups and our own."""
    proc = tmp_path / "proc"
    for name in ("self", "1"):
        (proc / name).mkdir(parents=True, exist_ok=True)
    rows = [f"{30 + n} 25 0:{n} {root} {point} rw,nosuid shared:9 - {kind} {kind} rw,{options}"
            for n, (root, point, kind, options) in enumerate(mounts)]  # fmt: skip
    (proc / "self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + "\n".join(rows) + "\n")
    (proc / "1/cgroup").write_text(homes)
    (proc / "self/cgroup").write_text(own)
    return proc


def test_hybrid_is_version_1(tmp_path: Path) -> None:
    mounts = [
        ("/", "/cg/cpu,cpuacct", "cgroup", "cpu,cpuacct"),
        ("/", "/cg/memory", "cgroup", "memory"),
        ("/", "/cg/systemd", "cgroup", "xattr,name=systemd"),
        ("/", "/cg/unified", "cgroup2", "nsdelegate"),
    ]
    homes = "3:cpu,cpuacct:/\n2:memory:/\n1:name=systemd:/init.scope\n0::/init.scope\n"
    found = Cgroups.detect(fake_proc(tmp_path, mounts, homes))
    assert found.version == "v1"
    assert found.bases["cpu"] == found.bases["cpuacct"] == Path("/cg/cpu,cpuacct")
    assert set(found.others) == {Path("/cg/systemd"), Path("/cg/unified")}
    paths = found.container("vzfleet/101").directories()
    assert Path("/cg/memory/vzfleet/101") in paths
    assert Path("/cg/unified/vzfleet/101") in paths
    assert len(paths) == 4


def test_pure_version_2_under_systemd(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, [("/", "/sys/fs/cgroup", "cgroup2", "nsdelegate")], "0::/init.scope\n")
    found = Cgroups.detect(proc)
    assert found.version == "v2"
    assert found.container("vzfleet/101").directories() == [Path("/sys/fs/cgroup/vzfleet/101")]


def test_begins_where_init_is(tmp_path: Path) -> None:
    mounts = [("/", "/cg/memory", "cgroup", "memory"), ("/lxc/box", "/cg/my\\040pids", "cgroup", "pids")]
    found = Cgroups.detect(fake_proc(tmp_path, mounts, "2:memory:/box\n1:pids:/lxc/box/deep\n0::/\n"))
    assert found.bases["memory"] == Path("/cg/memory/box")
    assert found.bases["pids"] == Path("/cg/my pids/deep")


def test_without_the_memory_controller_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported):
        Cgroups.detect(fake_proc(tmp_path, [("/", "/cg/cpu", "cgroup", "cpu")], "1:cpu:/\n"))


@pytest.mark.parametrize(
    ("mounts", "own", "directory"),
    [
        ([("/", "/cg", "cgroup2", "")], "0::/system.slice/agent.service\n", "/cg/system.slice/agent.service"),
        ([("/box", "/cg", "cgroup2", "")], "0::/box/agent\n", "/cg/agent"),
        ([("/", "/m", "cgroup", "memory"), ("/", "/2", "cgroup2", "")], "2:memory:/a\n0::/b\n", "/m/a"),
        ([("/", "/m", "cgroup", "memory")], "", None),
    ],
)
def test_our_own_cgroup(
    tmp_path: Path, mounts: list[tuple[str, str, str, str]], own: str, directory: str | None
) -> None:
    found = Cgroups.detect(fake_proc(tmp_path, mounts, "2:memory:/\n0::/\n", own))
    assert found.own == (Path(directory) if directory is not None else None)


async def test_a_move_is_prepared_by_moving_ourselves_to_where_we_are(tmp_path: Path) -> None:
    file = tmp_path / "cgroup.procs"
    file.touch()
    moves = Moves(tmp_path)
    moves.expect()
    await moves.prepared()
    assert file.read_text() == "0"
    file.write_text("")
    moves.expect()
    await moves.prepared()
    assert file.read_text() == "0"


async def test_a_move_that_cannot_be_prepared_is_no_fault(tmp_path: Path) -> None:
    for own in (tmp_path / "missing", None):
        moves = Moves(own)
        moves.expect()
        await moves.prepared()


async def test_preparing_a_move_leaves_us_where_we_are() -> None:
    if os.geteuid() != 0:
        pytest.skip("real cgroups need root")
    before = Path("/proc/self/cgroup").read_text()
    moves = Moves(Cgroups.detect().own)
    moves.expect()
    await moves.prepared()
    assert Path("/proc/self/cgroup").read_text() == before


@pytest.mark.parametrize("path", ["/etc", "../x", "vzfleet/../../x", ""])
def test_a_container_is_below_the_root(path: str) -> None:
    with pytest.raises(ValueError, match="cgroup root"):
        Cgroups("v2").container(path)


# ---------------------------------------------------------------- version 1 on plain files


def version_1(tmp_path: Path, files: dict[str, str]) -> ContainerCgroup:
    """A container `n/101` whose files are `<controller>/<name>`."""
    bases = {name: tmp_path / name for name in ("memory", "cpu", "cpuacct", "cpuset", "pids", "freezer")}
    for base in bases.values():
        (base / "n/101").mkdir(parents=True)
    for name, content in files.items():
        controller, _, file = name.partition("/")
        path = bases[controller] / "n/101" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Cgroups("v1", bases).container("n/101")


def test_figures_of_version_1(tmp_path: Path) -> None:
    stat = "cache 1\ntotal_cache 999\ntotal_inactive_file 300\ntotal_active_file 20\ntotal_swap 7\ntotal_shmem 50\n"
    container = version_1(
        tmp_path,
        {
            "memory/memory.usage_in_bytes": "5000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.max_usage_in_bytes": "6000\n",
            "memory/memory.stat": stat,
            "cpuacct/cpuacct.usage": "123456789\n",
            "pids/pids.current": "4\n",
        },
    )
    assert container.figures() == Figures(5000, None, 6000, 320, 7, 123456789, 4)


def test_what_is_gone_has_no_figures(tmp_path: Path) -> None:
    container = Cgroups("v1", {"memory": tmp_path}).container("n/gone")
    assert container.figures() == Figures()
    assert not container.exists()
    assert not container.frozen()
    assert container.pids() == []
    assert container.remove()


@pytest.mark.parametrize("place", ["freezer/freezer.state", "freezer/inner/freezer.state"])
def test_frozen_by_outer_or_inner_directory(tmp_path: Path, place: str) -> None:
    assert version_1(tmp_path / "a", {place: "FROZEN\n"}).frozen()
    assert not version_1(tmp_path / "b", {place: "THAWED\n"}).frozen()


def test_a_missing_controller_is_named(tmp_path: Path) -> None:
    with pytest.raises(DriverFailed, match=r"pids/.*pids\.max .*'5': No such file"):
        Cgroups("v1", {"memory": tmp_path}).container("n/101").set_processes(5)


# ---------------------------------------------------------------- version 2 on plain files


def version_2(tmp_path: Path, files: dict[str, str]) -> tuple[ContainerCgroup, Path]:
    directory = tmp_path / "n/101"
    directory.mkdir(parents=True)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return Cgroups("v2", unified=tmp_path).container("n/101"), directory


def test_figures_of_version_2(tmp_path: Path) -> None:
    container, _ = version_2(
        tmp_path,
        {
            "memory.current": "5000\n",
            "memory.max": "max\n",
            "memory.peak": "6000\n",
            "memory.stat": "anon 1000\nfile 700\ninactive_file 300\nactive_file 20\nslab_reclaimable 3\nshmem 380\n",
            "memory.swap.current": "0\n",
            "cpu.stat": "usage_usec 123\nuser_usec 100\n",
            "pids.current": "4\n",
            "cgroup.events": "populated 1\nfrozen 0\n",
            "inner/cgroup.events": "populated 1\nfrozen 1\n",
        },
    )
    assert container.figures() == Figures(5000, None, 6000, 323, 0, 123000, 4)
    assert container.frozen()


def test_limits_of_version_2(tmp_path: Path) -> None:
    names = ("memory.max", "memory.swap.max", "pids.max", "cpuset.cpus", "cpu.weight", "cpu.max")
    container, directory = version_2(tmp_path, dict.fromkeys(names, ""))
    (tmp_path / "n/cpuset.cpus.effective").write_text("0-3\n")

    def content() -> list[str]:
        return [(directory / name).read_text() for name in names]

    container.set_memory(64 * MIB)
    container.set_processes(20)
    container.set_cpus([2, 0])
    container.set_allowance(parse_allowance("25ms/50ms", "x"))
    assert content() == [str(64 * MIB), "0", "20", "0,2", "100", "25000 50000"]
    for name in names:
        (directory / name).write_text("")
    container.set_memory(None)
    container.set_processes(None)
    container.set_cpus(None)
    container.set_allowance(parse_allowance("25%", "x"))
    assert content() == ["max", "max", "max", "0-3", "25", "max 100000"]


def test_version_2_does_not_kill_by_a_limit(tmp_path: Path) -> None:
    container, directory = version_2(
        tmp_path, {"memory.current": "5000", "memory.max": "max", "memory.stat": "inactive_file 1000\n"}
    )
    with pytest.raises(DriverFailed, match="4000 bytes"):
        container.set_memory(3999)
    assert (directory / "memory.max").read_text() == "max"
    container.set_memory(4000)
    assert (directory / "memory.max").read_text() == "4000"


# ---------------------------------------------------------------- a start, and small things

LIMITS = parse_config(
    {"limits.memory": "20%", "limits.cpus": "2", "limits.cpu.allowance": "25ms/50ms", "limits.processes": "30"}
)


def test_lines_of_a_start_version_1(tmp_path: Path) -> None:
    (tmp_path / "memory.memsw.limit_in_bytes").write_text("")
    assert Cgroups("v1", {"memory": tmp_path}).lxc_limits(LIMITS, [1, 0], 1000 * MIB) == [
        ("lxc.cgroup.memory.limit_in_bytes", str(200 * MIB)),
        ("lxc.cgroup.memory.memsw.limit_in_bytes", str(200 * MIB)),
        ("lxc.cgroup.pids.max", "30"),
        ("lxc.cgroup.cpuset.cpus", "0,1"),
        ("lxc.cgroup.cpu.cfs_period_us", "50000"),
        ("lxc.cgroup.cpu.cfs_quota_us", "25000"),
    ]


def test_lines_of_a_start_version_2(tmp_path: Path) -> None:
    without_swap = [
        ("lxc.cgroup2.memory.max", str(200 * MIB)),
        ("lxc.cgroup2.pids.max", "30"),
        ("lxc.cgroup2.cpuset.cpus", "0,1"),
        ("lxc.cgroup2.cpu.max", "25000 50000"),
    ]
    cgroups = Cgroups("v2", unified=tmp_path)
    assert cgroups.lxc_limits(LIMITS, [1, 0], 1000 * MIB) == without_swap
    (tmp_path / "n").mkdir()
    (tmp_path / "n/memory.swap.max").write_text("max")
    assert ("lxc.cgroup2.memory.swap.max", "0") in cgroups.lxc_limits(LIMITS, [1, 0], 1000 * MIB)


def test_a_soft_share_and_no_limits(tmp_path: Path) -> None:
    soft = parse_config({"limits.cpu.allowance": "1%"})
    assert Cgroups("v1", {"memory": tmp_path}).lxc_limits(soft, None, MIB) == [("lxc.cgroup.cpu.shares", "10")]
    assert Cgroups("v2", unified=tmp_path).lxc_limits(soft, None, MIB) == [("lxc.cgroup2.cpu.weight", "1")]
    assert Cgroups("v2", unified=tmp_path).lxc_limits(parse_config({}), None, MIB) == []


def test_cpu_lists() -> None:
    assert parse_cpus("0-2,5\n") == [0, 1, 2, 5]
    assert parse_cpus("\n") == []
    assert format_cpus([5, 0, 5]) == "0,5"


def test_version_2_enables_what_is_there(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "n"):
        directory.mkdir(exist_ok=True)
        (directory / "cgroup.controllers").write_text("cpu memory hugetlb\n")
        (directory / "cgroup.subtree_control").write_text("cpu\n")
    Cgroups("v2", unified=tmp_path).prepare("n")
    # A plain file keeps the last write, from its beginning.
    assert (tmp_path / "n/cgroup.subtree_control").read_text() == "+memory"


def test_a_tree_deeper_than_any_path_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "deep"
    top.mkdir()
    descriptor = os.open(top, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("nested", dir_fd=descriptor)
        below = os.open("nested", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    (top / "beside/more").mkdir(parents=True)
    assert 100 < len(list(walk(top))) < 1500
    assert remove_tree(top)
    assert not top.exists()


# ---------------------------------------------------------------- real cgroups


@dataclass
class Real:
    """A container's directories as LXC makes them, with one process in the inner ones."""

    cgroups: Cgroups
    parent: str
    container: ContainerCgroup
    process: subprocess.Popen[bytes]

    def value(self, v1_file: str, v2_file: str, below: str = "") -> str:
        """What a limit's file says, by version."""
        if self.cgroups.version == "v2":
            path = self.cgroups.unified / self.parent / "101" / below / v2_file
        else:
            path = self.cgroups.bases[v1_file.partition(".")[0]] / self.parent / "101" / below / v1_file
        return (read_text(path) or "").strip()


@pytest.fixture
def real() -> Iterator[Real]:
    if os.geteuid() != 0:
        pytest.skip("real cgroups need root")
    cgroups = Cgroups.detect()
    parent = f"vzt-{secrets.token_hex(4)}"
    cgroups.prepare(parent)
    cgroups.prepare(f"{parent}/101")
    container = cgroups.container(f"{parent}/101")
    if cgroups.version == "v1":
        cgroups.prepare(f"{parent}/101/inner")
    process = subprocess.Popen(["sleep", "60"])
    for directory in container.directories():
        (directory / "inner").mkdir(parents=True, exist_ok=True)
        (directory / "inner/cgroup.procs").write_text(str(process.pid))
    yield Real(cgroups, parent, container, process)
    process.kill()
    process.wait()
    assert container.remove()
    assert cgroups.container(parent).remove()
    assert not cgroups.container(parent).exists()


def test_real_figures(real: Real) -> None:
    figures = real.container.figures()
    assert figures.processes == 1
    assert figures.memory_usage is not None
    assert figures.memory_limit is None
    assert figures.cpu_time is not None
    assert real.container.pids() == [real.process.pid]


def test_real_memory_limit_goes_down_and_up(real: Real) -> None:
    for limit in (64 * MIB, 32 * MIB, 128 * MIB):
        real.container.set_memory(limit)
        assert real.container.figures().memory_limit == limit
    if real.cgroups.version == "v1" and real.value("memory.memsw.limit_in_bytes", ""):
        assert real.value("memory.memsw.limit_in_bytes", "") == str(128 * MIB)
    real.container.set_memory(None)
    assert real.container.figures().memory_limit is None


def test_real_memory_limit_holds(real: Real) -> None:
    real.container.set_memory(16 * MIB)
    hog = subprocess.Popen(["sh", "-c", "read go; exec head -c 100m /dev/zero | tail"], stdin=subprocess.PIPE)
    for directory in real.container.directories():
        (directory / "inner/cgroup.procs").write_text(str(hog.pid))
    hog.communicate(b"go\n", timeout=30)
    peak = real.container.figures().memory_peak
    assert peak is None or peak <= 16 * MIB
    assert hog.returncode != 0


def test_a_limit_below_what_is_in_use_changes_nothing_and_kills_nothing(real: Real) -> None:
    script = (
        "import sys; sys.stdin.readline(); held = bytearray(40 << 20); print('held', flush=True); sys.stdin.readline()"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for directory in real.container.directories():
        (directory / "inner/cgroup.procs").write_text(str(holder.pid))
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(b"go\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == b"held\n"
    real.container.set_memory(100 * MIB)
    with pytest.raises(DriverFailed, match="memory"):
        real.container.set_memory(8 * MIB)
    assert real.container.figures().memory_limit == 100 * MIB
    assert holder.poll() is None
    holder.communicate(b"end\n")
    assert holder.returncode == 0


def test_real_process_limit_holds(real: Real) -> None:
    real.container.set_processes(3)
    assert real.value("pids.max", "pids.max") == "3"
    real.container.set_processes(None)
    assert real.value("pids.max", "pids.max") == "max"


def test_real_allowance(real: Real) -> None:
    real.container.set_allowance(parse_allowance("25ms/50ms", "x"))
    if real.cgroups.version == "v2":
        assert real.value("", "cpu.max") == "25000 50000"
    else:
        assert [real.value(f"cpu.cfs_{name}_us", "") for name in ("quota", "period")] == ["25000", "50000"]
    real.container.set_allowance(parse_allowance("50%", "x"))
    assert real.value("cpu.shares", "cpu.weight") in ("512", "50")
    assert real.value("cpu.cfs_quota_us", "cpu.max").split()[0] in ("-1", "max")
    real.container.set_allowance(None)
    assert real.value("cpu.shares", "cpu.weight") in ("1024", "100")


def test_a_quota_inside_the_container_does_not_stop_a_smaller_one(real: Real) -> None:
    if real.cgroups.version == "v2":
        pytest.skip("version 2 accepts any nested quota")
    inner = real.cgroups.bases["cpu"] / real.parent / "101/inner/cpu.cfs_quota_us"
    inner.write_text("90000")
    real.container.set_allowance(parse_allowance("20ms/100ms", "x"))
    assert real.value("cpu.cfs_quota_us", "") == "20000"


def test_real_cpus_shrink_and_grow(real: Real) -> None:
    cpus = real.cgroups.cpus()
    if len(cpus) < 2:
        pytest.skip("pinning needs two CPUs")
    for pinned in ([cpus[0]], [cpus[1]], cpus[:2], [cpus[1]]):
        real.container.set_cpus(pinned)
        assert os.sched_getaffinity(real.process.pid) == set(pinned)
    real.container.set_cpus(None)
    assert os.sched_getaffinity(real.process.pid) == set(cpus)


def test_a_cpu_that_is_not_there_is_refused_with_the_file(real: Real) -> None:
    if real.cgroups.version == "v2":
        pytest.skip("version 2 takes CPUs that are not there")
    with pytest.raises(DriverFailed, match=r"cpuset\.cpus does not take"):
        real.container.set_cpus([4095])
    assert os.sched_getaffinity(real.process.pid) == set(real.cgroups.cpus())


def test_what_has_processes_stays(real: Real) -> None:
    assert not real.container.remove()
    assert real.container.exists()
    assert real.process.poll() is None
    real.process.send_signal(signal.SIGKILL)
    real.process.wait()
    assert real.container.remove()
    assert not real.container.exists()


def test_numbers_of_kernel_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("max\n")
    (tmp_path / "b").write_text("-1\n")
    assert [read_number(tmp_path / name) for name in ("a", "b", "none")] == [None, -1, None]
