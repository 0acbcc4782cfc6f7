"""A running container's limits, and the CPUs that it is pinned to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import psutil

from agent.cgroups import Cgroups, ContainerCgroup
from agent.storage import Storage
from common.errors import Conflict, InvalidRequest, VzfleetError
from common.options import Settings


class CpuChooser:
    """Finds the least loaded CPUs."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        psutil.cpu_percent(percpu=True)

    def choose(self, count: int | None, pinned: Iterable[Sequence[int]]) -> tuple[int, ...]:
        """That many CPUs: those with the fewest containers pinned to them (`pinned`), then the least busy ones.

        Empty without a count. Raises InvalidRequest for more than there are.
        """
        if count is None:
            return ()
        available = self._cgroups.cpus()
        if count > len(available):
            allowed = f"at most {len(available)}"
            raise InvalidRequest("the node has too few CPUs", field="config.limits.cpus", allowed=allowed)
        busy = dict(enumerate(psutil.cpu_percent(percpu=True)))
        containers = Counter(cpu for cpus in pinned for cpu in cpus)
        best = sorted(available, key=lambda cpu: (containers[cpu], busy.get(cpu, 0.0), cpu))
        return tuple(sorted(best[:count]))


def check_disk(storage: Storage, files: str, limit: int | None) -> None:
    """Raise Conflict when a volume takes more than `limit` bytes already."""
    used, _ = storage.usage(files)
    if limit is not None and used is not None and used > limit:
        reason = f"{files} takes {used} bytes already"
        raise Conflict(reason, field="config.limits.disk", allowed=f"at least {used} bytes")


def apply(
    cgroup: ContainerCgroup,
    old: tuple[Settings, Sequence[int]],
    new: tuple[Settings, Sequence[int]],
    memory: int,
) -> None:
    """Change a running container's limits; when one is refused, those before it are put back, and it is raised.

    `memory` is the node's in bytes; the sequences are the CPUs pinned to.
    """
    undone: list[partial[None]] = []
    try:
        for change, put_back in zip(_changes(cgroup, *new, memory), _changes(cgroup, *old, memory), strict=True):
            if change.args != put_back.args:
                undone.append(put_back)
                change()
    except VzfleetError:
        for undo in reversed(undone):
            undo()
        raise


def enforce(cgroup: ContainerCgroup, settings: Settings, cpus: Sequence[int], memory: int) -> None:
    """Put all of a running container's limits in force again, whatever they are now."""
    for change in _changes(cgroup, settings, cpus, memory):
        change()
    cgroup.loosen_inner()


def _changes(cgroup: ContainerCgroup, settings: Settings, cpus: Sequence[int], memory: int) -> list[partial[None]]:
    return [
        partial(cgroup.set_memory, settings.memory_bytes(memory)),
        partial(cgroup.set_processes, settings.processes),
        partial(cgroup.set_cpus, list(cpus) or None),
        partial(cgroup.set_allowance, settings.allowance),
    ]
