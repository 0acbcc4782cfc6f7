"""One container's figures from its cgroups, /proc and its network namespace: no subprocess."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agent.cgroups import Cgroups, ContainerCgroup, Figures
from agent.metrics.interfaces import InterfaceReader
from agent.metrics.load import Load
from agent.metrics.processes import start_time
from common.clock import Clock
from common.options import Settings
from common.reports import ContainerSample

_NANO = 10**9
_YOUNG = 60.0
"""Seconds: a container younger than that has its first load measured from its start."""


@dataclass
class _Known:
    """What is kept of a running container between two samples."""

    pid: int
    started: float
    started_at: float
    path: str
    cgroup: ContainerCgroup
    load: Load = field(default_factory=Load)


class ContainerSampler:
    """Takes samples of containers, from any thread; keeps what the next CPU load needs.

    `clock.monotonic` must count from the machine's start (CLOCK_BOOTTIME), as /proc does.
    """

    def __init__(self, cgroups: Cgroups, clock: Clock, proc: Path = Path("/proc")) -> None:
        self._cgroups = cgroups
        self._clock = clock
        self._proc = str(proc)
        self._node_cpus = len(cgroups.cpus())
        self._interfaces = InterfaceReader()
        self._known: dict[str, _Known] = {}

    def close(self) -> None:
        """Let go of threads and descriptors."""
        self._interfaces.close()

    def forget(self, id: str) -> None:
        """A container is gone. Unknown is success."""
        self._known.pop(id, None)

    def sample(
        self, id: str, pid: int | None, cgroup: str, settings: Settings, disk: tuple[int | None, int | None]
    ) -> ContainerSample:
        """The figures now.

        `pid` is its init's, None when it is stopped: then there are disk figures only. `cgroup` is its outer
        directory (`vzfleet/101`), `disk` what the storage says: (bytes used, limit in bytes).
        """
        known = self._look_up(id, pid, cgroup)
        if known is None:
            return ContainerSample(id=id, disk_usage=disk[0], disk_limit=disk[1])
        figures = known.cgroup.figures()
        return ContainerSample(
            id=id,
            disk_usage=disk[0],
            disk_limit=disk[1],
            memory_limit=figures.memory_limit,
            memory_usage=figures.memory_usage,
            memory_reclaimable=figures.memory_reclaimable,
            memory_peak=figures.memory_peak,
            swap_usage=figures.swap_usage,
            cpu_time=figures.cpu_time,
            cpu_load=self._load(known, figures, settings),
            processes=figures.processes,
            pid=known.pid,
            started_at=known.started_at,
            interfaces=self._interfaces.read(known.pid),
        )

    def _look_up(self, id: str, pid: int | None, cgroup: str) -> _Known | None:
        """What is known of this very process; None when it does not run."""
        started = start_time(pid, self._proc) if pid is not None else None
        if pid is None or started is None:
            self.forget(id)
            return None
        known = self._known.get(id)
        if known is None or (known.pid, known.started, known.path) != (pid, started, cgroup):
            known = self._begin(pid, started, cgroup)
            self._known[id] = known
        return known

    def _begin(self, pid: int, started: float, cgroup: str) -> _Known:
        age = self._clock.monotonic() - started
        started_at = self._clock.now().timestamp() - age
        known = _Known(pid, started, started_at, cgroup, self._cgroups.container(cgroup))
        if 0 <= age < _YOUNG:
            known.load.start(started, 0.0)
        return known

    def _load(self, known: _Known, figures: Figures, settings: Settings) -> float | None:
        if figures.cpu_time is None:
            return None
        return known.load.share(self._clock.monotonic(), figures.cpu_time / _NANO, self._allotted(settings))

    def _allotted(self, settings: Settings) -> float:
        """The CPUs' worth of time that it can get: its hard quota, else its CPUs, else the node's; never more."""
        quota = settings.allowance.cpus if settings.allowance is not None else None
        cpus = min(settings.cpus or self._node_cpus, self._node_cpus)
        return min(quota, cpus) if quota is not None else cpus
