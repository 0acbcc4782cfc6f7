"""A running container's two processes: its init, and the `lxc-start` that watches over it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.cgroups import Cgroups
from agent.cgroups.files import read_text, walk


@dataclass(frozen=True)
class Processes:
    """Process ids on the host. `monitor` is None when somebody killed it: the container lives on without."""

    init: int
    monitor: int | None


class Finder:
    """Finds them by the cgroups in which they are."""

    def __init__(self, cgroups: Cgroups, base: str) -> None:
        hierarchy = (
            cgroups.unified if cgroups.version == "v2" else cgroups.bases.get("freezer", cgroups.bases["memory"])
        )
        self._base = hierarchy / base

    def names(self) -> set[str]:
        """The containers that have a cgroup."""
        try:
            return {path.name for path in self._base.iterdir() if not path.name.startswith(".") and path.is_dir()}
        except FileNotFoundError:
            return set()

    def monitor(self, container: str) -> int | None:
        """The process that watches over a container."""
        pids = _pids(self._base / ".monitor" / container)
        return pids[0] if pids else None

    def find(self, container: str) -> Processes | None:
        """A running container's processes, None when it has no init."""
        monitor = self.monitor(container)
        if monitor is not None:
            children = (read_text(f"/proc/{monitor}/task/{monitor}/children") or "").split()
            init = _first_of_its_namespace([int(pid) for pid in children])
            if init is not None:
                return Processes(init, monitor)
        inside = [pid for cgroup in walk(self._base / container) for pid in _pids(cgroup)]
        init = _first_of_its_namespace(inside)
        return Processes(init, monitor) if init is not None else None


def _pids(cgroup: Path) -> list[int]:
    return [int(pid) for pid in (read_text(cgroup / "cgroup.procs") or "").split() if pid != "0"]


def _first_of_its_namespace(pids: list[int]) -> int | None:
    """The process that is 1 in a pid namespace just below ours, not in one nested deeper, and no zombie."""
    ours = len(_numbers(read_text("/proc/self/status") or ""))
    for pid in pids:
        status = read_text(f"/proc/{pid}/status") or ""
        numbers = _numbers(status)
        if len(numbers) == ours + 1 and numbers[-1] == "1" and "\nState:\tZ" not in status:
            return pid
    return None


def _numbers(status: str) -> list[str]:
    """A process's number in each pid namespace, ours first (proc_pid_status(5), NSpid)."""
    line = next((line for line in status.splitlines() if line.startswith("NSpid:")), "NSpid:")
    return line.split()[1:]
