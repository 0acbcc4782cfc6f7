"""What can be asked of a container's cgroups, whatever their version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from agent.cgroups.files import read_text, remove_tree, walk
from common.options import Allowance


@dataclass(frozen=True, slots=True)
class Figures:
    """What a container uses: bytes and nanoseconds; None is "not known", for `memory_limit` also "no limit".

    `memory_reclaimable` is the file cache and the reclaimable slab, `processes` counts threads too (pids.current).
    """

    memory_usage: int | None = None
    memory_limit: int | None = None
    memory_peak: int | None = None
    memory_reclaimable: int | None = None
    swap_usage: int | None = None
    cpu_time: int | None = None
    processes: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What limits a running container now. None: no limit; `share` is the version's own number for a soft share."""

    memory: int | None
    processes: int | None
    cpus: tuple[int, ...]
    quota: tuple[int, int] | None
    """Microseconds of every period."""
    share: int


INNER = "ns"
"""The directory inside a container's own in which its processes are, and where `lxc-cgroup` writes."""


def tightest(outer: Limits, inner: Limits | None) -> Limits:
    """What holds where the one directory is inside of the other. A share counts among siblings: the inner has none."""
    if inner is None:
        return outer
    return Limits(
        memory=_least(outer.memory, inner.memory),
        processes=_least(outer.processes, inner.processes),
        cpus=inner.cpus or outer.cpus,
        quota=min((quota for quota in (outer.quota, inner.quota) if quota), key=lambda q: q[0] / q[1], default=None),
        share=outer.share,
    )


def _least(one: int | None, other: int | None) -> int | None:
    return min((number for number in (one, other) if number is not None), default=None)


class ContainerCgroup(ABC):
    """The outer cgroup of one container. It need not exist: figures are None then, and setters raise DriverFailed.

    Setters apply at once to the running container and raise DriverFailed with the file and the kernel's reason. Like
    `pids` and `remove` they may take long where a container has nested many cgroups: call them in a thread.
    """

    @abstractmethod
    def directories(self) -> list[Path]:
        """The container's outer directory in every hierarchy."""

    @abstractmethod
    def figures(self) -> Figures:
        """What it uses now."""

    @abstractmethod
    def limits(self) -> Limits | None:
        """What limits it now, by the outer or the inner directory; None where that cannot be read, as after its end."""

    @abstractmethod
    def loosen_inner(self) -> None:
        """Take all limits of the inner directory away, which nobody but a hand has set; those of the outer one hold."""

    @abstractmethod
    def share_of(self, allowance: Allowance | None) -> int:
        """The number that `limits` has as `share` for an allowance."""

    @abstractmethod
    def cpu_time(self) -> int | None:
        """CPU time used by all of its processes since its start, in nanoseconds."""

    @abstractmethod
    def frozen(self) -> bool:
        """Whether it is frozen, by its outer or its inner directory."""

    @abstractmethod
    def set_memory(self, limit: int | None) -> None:
        """Limit memory and swap together to `limit` bytes; None takes the limit away.

        A limit below what cannot be reclaimed is refused (the kernel's own EBUSY on v1): nothing is killed by it.
        """

    @abstractmethod
    def set_processes(self, limit: int | None) -> None:
        """Limit the number of processes and threads; None takes the limit away."""

    @abstractmethod
    def set_cpus(self, cpus: list[int] | None) -> None:
        """Pin it to these CPUs; None allows all that the node's containers may use."""

    @abstractmethod
    def set_allowance(self, allowance: Allowance | None) -> None:
        """Set the soft share or the hard quota of CPU time; None is the kernel's default, and no quota."""

    def exists(self) -> bool:
        """Whether any hierarchy still has a directory of it."""
        return any(directory.exists() for directory in self.directories())

    def pids(self) -> list[int]:
        """The processes in it and in all cgroups below, in every hierarchy."""
        found: set[int] = set()
        for directory in self.directories():
            for cgroup in walk(directory):
                found.update(int(pid) for pid in (read_text(cgroup / "cgroup.procs") or "").split())
        found.discard(0)  # a process of another pid namespace
        return sorted(found)

    def remove(self) -> bool:
        """Sweep its directories in every hierarchy, bottom-up; those with processes stay. True when all are gone."""
        gone = [remove_tree(directory) for directory in self.directories()]
        return all(gone)
