"""A container's cgroups in version 1 (Documentation/admin-guide/cgroup-v1/, sched-bwc.rst)."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from agent.cgroups.base import INNER, ContainerCgroup, Figures, Limits, tightest
from agent.cgroups.files import (
    format_cpus,
    make_directory,
    parse_cpus,
    read_keys,
    read_number,
    read_text,
    walk,
    write_text,
)
from common.errors import DriverFailed
from common.options import Allowance, Settings

# "No limit" is the greatest page-aligned number, 2^63 less a page.
_UNLIMITED = 2**60
DEFAULT_SHARES = 1024
DEFAULT_PERIOD = 100_000


class ContainerV1(ContainerCgroup):
    """A container's directory in each hierarchy; `bases` maps a controller to the directory where ours begin."""

    def __init__(self, bases: Mapping[str, Path], others: tuple[Path, ...], relative: str) -> None:
        self._bases = bases
        self._others = others
        self._relative = relative
        files = {
            "usage": self._file("memory", "memory.usage_in_bytes"),
            "limit": self._file("memory", "memory.limit_in_bytes"),
            "peak": self._file("memory", "memory.max_usage_in_bytes"),
            "stat": self._file("memory", "memory.stat"),
            "cpu": self._file("cpuacct", "cpuacct.usage"),
            "processes": self._file("pids", "pids.current"),
        }
        # Texts, not Path objects, which take ten times the memory: these are opened at every sample.
        self._paths = {name: str(path) for name, path in files.items()}

    def directories(self) -> list[Path]:
        return sorted({base / self._relative for base in (*self._bases.values(), *self._others)})

    def figures(self) -> Figures:
        stat = read_keys(self._paths["stat"])
        limit = read_number(self._paths["limit"])
        return Figures(
            memory_usage=read_number(self._paths["usage"]),
            memory_limit=limit if limit is not None and limit < _UNLIMITED else None,
            memory_peak=read_number(self._paths["peak"]),
            memory_reclaimable=_reclaimable(stat),
            swap_usage=stat.get("total_swap"),
            cpu_time=self.cpu_time(),
            processes=read_number(self._paths["processes"]),
        )

    def limits(self) -> Limits | None:
        outer = self._limits("")
        return None if outer is None else tightest(outer, self._limits(f"{INNER}/"))

    def _limits(self, place: str) -> Limits | None:
        memory = read_number(self._file("memory", f"{place}memory.limit_in_bytes"))
        share = read_number(self._file("cpu", f"{place}cpu.shares"))
        cpus = read_text(self._file("cpuset", f"{place}cpuset.cpus"))
        processes = read_text(self._file("pids", f"{place}pids.max"))
        quota, period = (read_number(self._file("cpu", f"{place}cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if memory is None or share is None or cpus is None or processes is None or quota is None or period is None:
            return None
        return Limits(
            memory=memory if memory < _UNLIMITED else None,
            processes=None if processes.strip() == "max" else int(processes),
            cpus=tuple(parse_cpus(cpus)),
            quota=(quota, period) if quota > 0 else None,
            share=share,
        )

    def loosen_inner(self) -> None:
        values = [
            ("memory", "memory.memsw.limit_in_bytes", "-1"),
            ("memory", "memory.limit_in_bytes", "-1"),
            ("pids", "pids.max", "max"),
            ("cpu", "cpu.cfs_quota_us", "-1"),
            ("cpuset", "cpuset.cpus", (read_text(self._file("cpuset", "cpuset.cpus")) or "").strip()),
        ]
        for controller, name, value in values:
            file = self._file(controller, f"{INNER}/{name}")
            if file.exists():
                write_text(file, value)

    def share_of(self, allowance: Allowance | None) -> int:
        return shares(allowance)

    def cpu_time(self) -> int | None:
        return read_number(self._paths["cpu"])

    def frozen(self) -> bool:
        if "freezer" not in self._bases:
            return False
        outer = self._bases["freezer"] / self._relative
        states = (read_text(path) for path in (outer / "freezer.state", *outer.glob("*/freezer.state")))
        return any((state or "").strip() == "FROZEN" for state in states)

    def set_memory(self, limit: int | None) -> None:
        plain = self._file("memory", "memory.limit_in_bytes")
        with_swap = self._file("memory", "memory.memsw.limit_in_bytes")
        value = -1 if limit is None else limit
        files = [plain, with_swap] if with_swap.exists() else [plain]
        # At every moment the limit with swap must not be the smaller one.
        before = read_number(plain)
        if limit is None or (before is not None and limit > before):
            files.reverse()
        previous = read_number(files[0])
        write_text(files[0], str(value))
        for second in files[1:]:
            try:
                write_text(second, str(value))
            except DriverFailed:
                write_text(files[0], str(previous))
                raise

    def set_processes(self, limit: int | None) -> None:
        write_text(self._file("pids", "pids.max"), "max" if limit is None else str(limit))

    def set_cpus(self, cpus: list[int] | None) -> None:
        outer = self._file("cpuset", "cpuset.cpus")
        old = set(parse_cpus(read_text(outer) or ""))
        above = read_text(outer.parent.parent / "cpuset.cpus")
        new = set(cpus if cpus is not None else parse_cpus(above or ""))
        # Version 1 demands a subset of the parent at every moment: grow from the top, then shrink from the bottom.
        below = [cgroup / "cpuset.cpus" for cgroup in walk(outer.parent)]
        pinned = {file: set(parse_cpus(read_text(file) or "")) for file in below}
        for file in below:
            write_text(file, format_cpus(old | new))
        for file in reversed(below):
            nested = pinned[file] & new if pinned[file] != old else new
            write_text(file, format_cpus(nested or new))

    def set_allowance(self, allowance: Allowance | None) -> None:
        quota = self._file("cpu", "cpu.cfs_quota_us")
        write_text(self._file("cpu", "cpu.shares"), str(shares(allowance)))
        write_text(quota, "-1")
        if allowance is None or allowance.quota_us is None:
            return
        write_text(self._file("cpu", "cpu.cfs_period_us"), str(allowance.period_us))
        try:
            write_text(quota, str(allowance.quota_us))
        except DriverFailed as error:
            if error.details.get("errno") != errno.EINVAL:
                raise
            # A quota set inside the container that exceeds the new one makes the kernel refuse it: ours goes first.
            for cgroup in walk(quota.parent):
                write_text(cgroup / "cpu.cfs_quota_us", "-1")
            write_text(quota, str(allowance.quota_us))

    def _file(self, controller: str, name: str) -> Path:
        # A controller that is not mounted shows as a file that is not there.
        if controller not in self._bases:
            return Path("/sys/fs/cgroup") / controller / "not-mounted" / name
        return self._bases[controller] / self._relative / name


def _reclaimable(stat: Mapping[str, int]) -> int | None:
    if not stat:
        return None
    keys = ("total_inactive_file", "total_active_file", "total_slab_reclaimable")
    return sum(stat.get(key, 0) for key in keys)


def shares(allowance: Allowance | None) -> int:
    """cpu.shares of an allowance: a soft share of the default 1024, at least the kernel's minimum of 2."""
    if allowance is None or allowance.share is None:
        return DEFAULT_SHARES
    return max(2, DEFAULT_SHARES * allowance.share // 100)


def lxc_limits(
    settings: Settings, cpus: list[int] | None, memory: int | None, swap_limits: bool
) -> list[tuple[str, str]]:
    """The lines `lxc.cgroup.*` for a start; LXC itself writes the plain memory limit before the one with swap."""
    lines: list[tuple[str, str]] = []
    if memory is not None:
        lines.append(("lxc.cgroup.memory.limit_in_bytes", str(memory)))
        if swap_limits:
            lines.append(("lxc.cgroup.memory.memsw.limit_in_bytes", str(memory)))
    if settings.processes is not None:
        lines.append(("lxc.cgroup.pids.max", str(settings.processes)))
    if cpus is not None:
        lines.append(("lxc.cgroup.cpuset.cpus", format_cpus(cpus)))
    if settings.allowance is not None and settings.allowance.quota_us is not None:
        lines.append(("lxc.cgroup.cpu.cfs_period_us", str(settings.allowance.period_us)))
        lines.append(("lxc.cgroup.cpu.cfs_quota_us", str(settings.allowance.quota_us)))
    elif settings.allowance is not None:
        lines.append(("lxc.cgroup.cpu.shares", str(shares(settings.allowance))))
    return lines


def prepare(bases: Mapping[str, Path], relative: str) -> None:
    """Make the directories from a base down to `relative` and give each cpuset its parent's CPUs and memory nodes.

    A cpuset without them takes no process (cpusets.rst). Raises DriverFailed.
    """
    for controller, base in bases.items():
        parent = base
        for part in Path(relative).parts:
            directory = parent / part
            make_directory(directory)
            if controller == "cpuset":
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if not (read_text(directory / name) or "").strip():
                        write_text(directory / name, (read_text(parent / name) or "").strip())
            parent = directory
