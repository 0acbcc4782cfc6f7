"""The parts of a node that the driver is made of, and what a container's configuration says of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from agent.cgroups import Cgroups, ContainerCgroup, Moves
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
from common.errors import DriverFailed, InvalidRequest

_INTERFACES = Path("/sys/class/net")
# LXC hands a script's path to a shell as it is.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/_.,@+=-]+")
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")


class Host:
    """Storage, network, cgroups and records of one node."""

    def __init__(self, config: AgentConfig, storage: Storage, network: Network, cgroups: Cgroups) -> None:
        self.config = config
        self.storage = storage
        self.network = network
        self.cgroups = cgroups
        self.moves = Moves(cgroups.own)
        self.records = Records(config.state / "lxc")
        self.ids = IdMap(config.first_id, config.id_count)
        self.finder = Finder(cgroups, config.cgroup)
        self.cpus = CpuChooser(cgroups)
        self.memory = node_memory()

    @property
    def seccomp(self) -> Path:
        """The file with the system calls that containers are refused."""
        return self.config.state / "seccomp.profile"

    @property
    def attach(self) -> Path:
        """The program that puts a container's cable into the bridge.

        LXC itself looks for the bridge in /sys, which shows the network namespace in which it was mounted, and not
        that of an agent in a namespace of its own.
        """
        return self.config.state / "attach-cable"

    async def open(self) -> None:
        """Make ready what is not opened yet. Raises InvalidRequest for a state directory with an unusable path."""
        if not _PLAIN_PATH.fullmatch(str(self.config.state)):
            allowed = "letters, digits and / _ . , @ + = -"
            raise InvalidRequest(f"unusable path {self.config.state}", field="state", allowed=allowed)
        # Mapped roots get to their files, by their group; users of the host do not, to whom a setuid program of an
        # image would give the ids of all containers.
        os.chown(self.storage.root, 0, self.ids.first)
        self.storage.root.chmod(0o710)
        seccomp.write(self.seccomp)
        # lxc.container.conf(5), lxc.net.[i].script.up: the fifth argument is the host's end of the cable.
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        self.attach.write_text(f'#!/bin/sh\n{path}\nexec ip link set dev "$5" master {self.network.bridge} up\n')
        self.attach.chmod(0o700)
        self.cgroups.prepare(self.config.cgroup)
        await self.records.open()

    def rootfs(self, container: str) -> Path:
        """A container's root directory."""
        return self.storage.path(f"containers/{container}") / "rootfs"

    def require_files(self, container: str) -> Path:
        """Its root directory. Raises DriverFailed when it was removed by hand."""
        root = self.rootfs(container)
        if not root.is_dir():
            raise DriverFailed(f"the files of container {container} are missing: {root}")
        return root

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
            attach=None if (_INTERFACES / self.network.bridge).exists() else self.attach,
            veth=self.veth(record.spec.id),
            seccomp=self.seccomp,
            apparmor=_apparmor(),
            # Unlike Path.is_dir, this takes the mount of an lxcfs that died for what it is: nothing.
            lxcfs=os.path.isdir(LXCFS / "proc"),  # noqa: PTH112
            first_id=self.ids.first,
            id_count=self.ids.count,
            halt_signal=record.halt_signal or SIGPWR,
        )
        return lines_for(record.spec, settings, around)


def _apparmor() -> bool:
    return _APPARMOR.exists() and _APPARMOR.read_text().strip() == "Y"
