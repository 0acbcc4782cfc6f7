"""The parts of a node that the driver is made of, and what a container's configuration says of them."""

from __future__ import annotations

from pathlib import Path

from agent.cgroups import Cgroups, ContainerCgroup
from agent.config import AgentConfig
from agent.drivers.lxc import commands, seccomp
from agent.drivers.lxc.config import LXCFS, Lines, Surroundings, lines_for
from agent.drivers.lxc.ids import IdMap
from agent.drivers.lxc.limits import CpuChooser
from agent.drivers.lxc.processes import Finder
from agent.drivers.lxc.records import Record, Records
from agent.drivers.lxc.rootfs import SIGPWR
from agent.metrics.host import node_memory
from agent.network import Network
from agent.storage import Storage

_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")


class Host:
    """Storage, network, cgroups and records of one node."""

    def __init__(self, config: AgentConfig, storage: Storage, network: Network, cgroups: Cgroups) -> None:
        self.config = config
        self.storage = storage
        self.network = network
        self.cgroups = cgroups
        self.records = Records(config.state / "lxc")
        self.ids = IdMap(config.first_id, config.id_count)
        self.finder = Finder(cgroups, config.cgroup)
        self.cpus = CpuChooser(cgroups)
        self.memory = node_memory()

    @property
    def seccomp(self) -> Path:
        """The file with the system calls that containers are refused."""
        return self.config.state / "seccomp.profile"

    async def open(self) -> None:
        """Make ready what is not opened yet."""
        seccomp.write(self.seccomp)
        self.cgroups.prepare(self.config.cgroup)
        await self.records.open()

    def rootfs(self, container: str) -> Path:
        """A container's root directory."""
        return self.storage.path(f"containers/{container}") / "rootfs"

    def cgroup_path(self, container: str) -> str:
        """A container's outer cgroup, below the base of each hierarchy."""
        return f"{self.config.cgroup}/{container}"

    def cgroup(self, container: str) -> ContainerCgroup:
        """A container's outer cgroup."""
        return self.cgroups.container(self.cgroup_path(container))

    def veth(self, container: str) -> str:
        """The host's end of a container's network cable."""
        return commands.veth_name(self.config.state, container)

    def owner(self, privileged: bool) -> int:
        """The host id of a container's root."""
        return 0 if privileged else self.ids.first

    def id_map(self, privileged: bool) -> IdMap | None:
        """The id map of a container, None for a privileged one."""
        return None if privileged else self.ids

    def lines(self, record: Record) -> Lines:
        """A container's configuration as it is to be at its next start."""
        settings = record.settings
        limits = self.cgroups.lxc_limits(settings, list(record.cpus) or None, self.memory)
        around = Surroundings(
            rootfs=self.rootfs(record.spec.id),
            cgroup=self.config.cgroup,
            version=self.cgroups.version,
            limits=tuple(limits),
            bridge=self.network.bridge,
            veth=self.veth(record.spec.id),
            seccomp=self.seccomp,
            apparmor=_apparmor(),
            lxcfs=(LXCFS / "proc").is_dir(),
            first_id=self.ids.first,
            id_count=self.ids.count,
            halt_signal=record.halt_signal or SIGPWR,
        )
        return lines_for(record.spec, settings, around)


def _apparmor() -> bool:
    return _APPARMOR.exists() and _APPARMOR.read_text().strip() == "Y"
