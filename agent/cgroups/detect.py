"""Which cgroups a machine has mounted, and where the containers' directories begin in them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from agent.cgroups import v1, v2
from agent.cgroups.base import ContainerCgroup
from agent.cgroups.files import parse_cpus, read_text
from common.errors import Unsupported
from common.options import Settings

V1_CONTROLLERS = frozenset({"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids"})
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class _Mount:
    root: str
    point: Path
    type: str
    options: frozenset[str]


@dataclass(frozen=True)
class Cgroups:
    """The cgroup hierarchies of this machine.

    `version` is `v1` (also hybrid: the controllers are v1's, and v2 is mounted beside them without any) or `v2`.
    `bases` maps a v1 controller to the directory where LXC begins, `others` are the bases of hierarchies without a
    controller of ours (systemd's, the hybrid v2); `unified` is the base on v2. `own` is the cgroup of this process,
    in the hierarchy of the memory controller or on v2, None when it cannot be told.
    """

    version: Literal["v1", "v2"]
    bases: dict[str, Path] = field(default_factory=dict)
    others: tuple[Path, ...] = ()
    unified: Path = Path("/sys/fs/cgroup")
    own: Path | None = None

    @classmethod
    def detect(cls, proc: Path = Path("/proc")) -> Cgroups:
        """Read what is mounted from `<proc>/self/mountinfo`. Raises Unsupported without a usable memory controller.

        LXC run by root begins where init is (`/proc/1/cgroup`, less systemd's `init.scope`), so do we.
        """
        mounts = _cgroup_mounts((proc / "self/mountinfo").read_text(errors="surrogateescape"))
        homes = _homes((proc / "1/cgroup").read_text())
        ours = _homes(read_text(proc / "self/cgroup") or "")
        own: Path | None = None
        bases: dict[str, Path] = {}
        others: list[Path] = []
        for mount in mounts:
            if mount.type == "cgroup2":
                others.append(_base(mount, homes.get("", "/")))
                continue
            controllers = mount.options & V1_CONTROLLERS
            name = next((option for option in sorted(mount.options) if option in homes), None)
            base = _base(mount, homes.get(name, "/") if name else "/")
            bases.update(dict.fromkeys(sorted(controllers), base))
            if "memory" in controllers and "memory" in ours:
                own = _base(mount, ours["memory"])
            if not controllers:
                others.append(base)
        if "memory" in bases:
            return cls("v1", bases, tuple(others), own=own)
        unified = next((mount for mount in mounts if mount.type == "cgroup2"), None)
        if unified is None:
            raise Unsupported("no cgroup hierarchy with the memory controller is mounted")
        own = _base(unified, ours[""]) if "" in ours else None
        return cls("v2", unified=_base(unified, homes.get("", "/")), own=own)

    def container(self, relative: str) -> ContainerCgroup:
        """The outer cgroup of a container, such as `vzfleet/101`. A path that leads elsewhere is ValueError."""
        path = PurePosixPath(relative)
        if path.is_absolute() or not path.parts or ".." in path.parts:
            raise ValueError(f"not a path below the cgroup root: {relative!r}")
        if self.version == "v1":
            return v1.ContainerV1(self.bases, self.others, relative)
        return v2.ContainerV2(self.unified, relative)

    def prepare(self, relative: str) -> None:
        """Make the directory below which containers are to be, so that limits work there. Idempotent.

        Raises DriverFailed.
        """
        if self.version == "v1":
            v1.prepare(self.bases, relative)
        else:
            v2.prepare(self.unified, relative)

    def lxc_limits(self, settings: Settings, cpus: list[int] | None, node_memory: int) -> list[tuple[str, str]]:
        """The lines of LXC's configuration that set a container's limits at its start.

        `cpus` are the CPUs that it is pinned to, `node_memory` the node's memory in bytes (for a limit in %).
        """
        memory = settings.memory_bytes(node_memory)
        if self.version == "v1":
            return v1.lxc_limits(settings, cpus, memory, self._swap_limits())
        return v2.lxc_limits(settings, cpus, memory, self._swap_limits())

    def cpus(self) -> list[int]:
        """The CPUs that containers here may use: online, and allowed to our cgroups."""
        if self.version == "v1" and "cpuset" in self.bases:
            text = read_text(self.bases["cpuset"] / "cpuset.effective_cpus") or read_text(
                self.bases["cpuset"] / "cpuset.cpus"
            )
        else:
            text = read_text(self.unified / "cpuset.cpus.effective")
        return parse_cpus(text or "") or online_cpus()

    def _swap_limits(self) -> bool:
        if self.version == "v1":
            return (self.bases["memory"] / "memory.memsw.limit_in_bytes").exists()
        # The root has no such file: any directory below tells whether the kernel counts swap.
        return any(self.unified.glob("*/memory.swap.max"))


def online_cpus(file: Path = Path("/sys/devices/system/cpu/online")) -> list[int]:
    """The numbers of the CPUs that are online."""
    return parse_cpus(read_text(file) or "") or sorted(os.sched_getaffinity(0))


def _cgroup_mounts(mountinfo: str) -> list[_Mount]:
    """The cgroup mounts of proc_pid_mountinfo(5), each hierarchy once."""
    found: dict[tuple[str, frozenset[str]], _Mount] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _source, options) = before.split(), [*after.split(), "", "", ""][:3]
        if kind in ("cgroup", "cgroup2") and len(fields) >= 5:
            names = frozenset(options.split(",")) - {"rw", "ro"}
            key = (kind, names if kind == "cgroup" else frozenset())
            found.setdefault(key, _Mount(_unescape(fields[3]), Path(_unescape(fields[4])), kind, names))
    return list(found.values())


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def _homes(text: str) -> dict[str, str]:
    """Where init is: controller (or `name=systemd`, or "" for version 2) to path, of proc_pid_cgroup (cgroups(7))."""
    homes: dict[str, str] = {}
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        path = path.removesuffix("/init.scope") or "/"
        homes.update(dict.fromkeys(names.split(","), path))
    return homes


def _base(mount: _Mount, home: str) -> Path:
    """The directory that shows init's cgroup under a mount point which shows the hierarchy from `mount.root` down."""
    if mount.root != "/" and (home + "/").startswith(mount.root + "/"):
        home = home[len(mount.root) :]
    return mount.point / home.lstrip("/")
