"""A container's cgroup in version 2 (Documentation/admin-guide/cgroup-v2.rst).

Under systemd our directories stand at the top, beside its slices, as LXC's own do (`lxc.payload.*`). systemd leaves
directories alone that it did not make, and it cannot take a controller away from the root that one of them has
enabled for its children (the kernel refuses it): so a live limit stays in force through a `daemon-reload`. The
agent's own unit is no place for them: stopping the unit would end the containers.
"""

from __future__ import annotations

from pathlib import Path

from agent.cgroups.base import INNER, ContainerCgroup, Figures, Limits, tightest
from agent.cgroups.files import (
    format_cpus,
    make_directory,
    parse_cpus,
    read_keys,
    read_number,
    read_text,
    write_text,
)
from common.errors import DriverFailed
from common.options import Allowance, Settings

CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
DEFAULT_WEIGHT = 100
DEFAULT_PERIOD = 100_000


class ContainerV2(ContainerCgroup):
    """A container's directory in the one hierarchy."""

    def __init__(self, base: Path, relative: str) -> None:
        self._directory = base / relative
        # A text, not a Path object: files in it are opened at every sample.
        self._prefix = f"{self._directory}/"

    def directories(self) -> list[Path]:
        return [self._directory]

    def figures(self) -> Figures:
        stat = read_keys(self._prefix + "memory.stat")
        return Figures(
            memory_usage=read_number(self._prefix + "memory.current"),
            memory_limit=read_number(self._prefix + "memory.max"),
            memory_peak=read_number(self._prefix + "memory.peak"),
            memory_reclaimable=_reclaimable(stat),
            swap_usage=read_number(self._prefix + "memory.swap.current"),
            cpu_time=self.cpu_time(),
            processes=read_number(self._prefix + "pids.current"),
        )

    def limits(self) -> Limits | None:
        outer = self._limits("")
        return None if outer is None else tightest(outer, self._limits(f"{INNER}/"))

    def _limits(self, place: str) -> Limits | None:
        prefix = self._prefix + place
        memory, processes = read_text(prefix + "memory.max"), read_text(prefix + "pids.max")
        cpus, share = read_text(prefix + "cpuset.cpus"), read_number(prefix + "cpu.weight")
        time = (read_text(prefix + "cpu.max") or "").split()
        if memory is None or processes is None or cpus is None or share is None or len(time) != 2:
            return None
        return Limits(
            memory=None if memory.strip() == "max" else int(memory),
            processes=None if processes.strip() == "max" else int(processes),
            cpus=tuple(parse_cpus(cpus)),
            quota=None if time[0] == "max" else (int(time[0]), int(time[1])),
            share=share,
        )

    def loosen_inner(self) -> None:
        inner = self._directory / INNER
        cpus = (read_text(self._directory / "cpuset.cpus.effective") or "").strip()
        values = {"memory.max": "max", "memory.swap.max": "max", "pids.max": "max", "cpu.max": f"max {DEFAULT_PERIOD}"}
        for name, value in values.items():
            if (inner / name).exists():
                write_text(inner / name, value)
        # Where it is empty nothing was set, and once it has processes it cannot be emptied again.
        if (read_text(inner / "cpuset.cpus") or "").strip():
            write_text(inner / "cpuset.cpus", cpus)

    def share_of(self, allowance: Allowance | None) -> int:
        return weight(allowance)

    def cpu_time(self) -> int | None:
        used = read_keys(self._prefix + "cpu.stat").get("usage_usec")
        return None if used is None else used * 1000

    def frozen(self) -> bool:
        events = (self._directory / "cgroup.events", *self._directory.glob("*/cgroup.events"))
        return any(read_keys(path).get("frozen") == 1 for path in events)

    def set_memory(self, limit: int | None) -> None:
        self._refuse_killing(limit)
        # No swap beside the limit, so that it holds for both together, as on version 1.
        swap = self._directory / "memory.swap.max"
        write_text(self._directory / "memory.max", "max" if limit is None else str(limit))
        if swap.exists():
            write_text(swap, "max" if limit is None else "0")

    def _refuse_killing(self, limit: int | None) -> None:
        # Version 2 kills where version 1 answers EBUSY.
        usage = read_number(self._prefix + "memory.current")
        if limit is None or usage is None:
            return
        needed = usage - (_reclaimable(read_keys(self._prefix + "memory.stat")) or 0)
        if needed > limit:
            raise DriverFailed(f"memory.max cannot be {limit}: {needed} bytes are in use and cannot be reclaimed")

    def set_processes(self, limit: int | None) -> None:
        write_text(self._directory / "pids.max", "max" if limit is None else str(limit))

    def set_cpus(self, cpus: list[int] | None) -> None:
        # A cpuset with processes cannot be emptied again (ENOSPC, Linux 6.1): it gets all that its parent has.
        allowed = read_text(self._directory.parent / "cpuset.cpus.effective") or ""
        write_text(self._directory / "cpuset.cpus", allowed.strip() if cpus is None else format_cpus(cpus))

    def set_allowance(self, allowance: Allowance | None) -> None:
        write_text(self._directory / "cpu.weight", str(weight(allowance)))
        write_text(self._directory / "cpu.max", quota(allowance) or f"max {DEFAULT_PERIOD}")


def _reclaimable(stat: dict[str, int]) -> int | None:
    if not stat:
        return None
    return sum(stat.get(key, 0) for key in ("inactive_file", "active_file", "slab_reclaimable"))


def weight(allowance: Allowance | None) -> int:
    """cpu.weight of an allowance: a soft share of the default 100."""
    return DEFAULT_WEIGHT if allowance is None or allowance.share is None else max(1, allowance.share)


def quota(allowance: Allowance | None) -> str | None:
    """cpu.max of a hard quota, None for a soft share."""
    if allowance is None or allowance.quota_us is None:
        return None
    return f"{allowance.quota_us} {allowance.period_us}"


def lxc_limits(
    settings: Settings, cpus: list[int] | None, memory: int | None, swap_limits: bool
) -> list[tuple[str, str]]:
    """The lines `lxc.cgroup2.*` for a start."""
    lines: list[tuple[str, str]] = []
    if memory is not None:
        lines.append(("lxc.cgroup2.memory.max", str(memory)))
        if swap_limits:
            lines.append(("lxc.cgroup2.memory.swap.max", "0"))
    if settings.processes is not None:
        lines.append(("lxc.cgroup2.pids.max", str(settings.processes)))
    if cpus is not None:
        lines.append(("lxc.cgroup2.cpuset.cpus", format_cpus(cpus)))
    hard = quota(settings.allowance)
    if hard is not None:
        lines.append(("lxc.cgroup2.cpu.max", hard))
    elif settings.allowance is not None:
        lines.append(("lxc.cgroup2.cpu.weight", str(weight(settings.allowance))))
    return lines


def prepare(base: Path, relative: str) -> None:
    """Make the directories from the base down to `relative` and enable our controllers for what is below each.

    Raises DriverFailed.
    """
    directory = base
    enable_controllers(directory)
    for part in Path(relative).parts:
        directory = directory / part
        make_directory(directory)
        enable_controllers(directory)


def enable_controllers(directory: Path) -> None:
    """Enable those of our controllers that a cgroup has and does not give to its children yet."""
    available = (read_text(directory / "cgroup.controllers") or "").split()
    enabled = (read_text(directory / "cgroup.subtree_control") or "").split()
    for name in CONTROLLERS:
        if name in available and name not in enabled:
            write_text(directory / "cgroup.subtree_control", f"+{name}")
