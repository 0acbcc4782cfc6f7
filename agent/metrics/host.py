"""The node's own figures, by psutil."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterable

import psutil

from agent.cgroups.detect import online_cpus
from agent.metrics.load import Load
from common import VERSION
from common.reports import NodeFacts, NodeSample


class NodeLoad:
    """The load of all CPUs between two calls; whoever samples has one of its own."""

    def __init__(self) -> None:
        self._load = Load()
        self._load.start(_uptime(), _busy())

    def share(self) -> float | None:
        """The share of all CPUs that was busy since the last call, 0 to 1; None when that was too short ago."""
        return self._load.share(_uptime(), _busy(), len(online_cpus()))


def sample_node(pool: tuple[int, int], load: NodeLoad) -> NodeSample:
    """The node's load now; `pool` is the storage pool's (size, free) in bytes."""
    return NodeSample(
        memory_free=psutil.virtual_memory().available,
        disk_free=pool[1],
        cpu_load=load.share(),
        load_average=os.getloadavg(),
        uptime=_uptime(),
    )


def node_facts(
    *,
    driver: str,
    driver_version: str,
    storage: str,
    cgroup: str,
    subnet: str | None,
    pool: tuple[int, int],
    capabilities: Iterable[str],
    id_map: str,
) -> NodeFacts:
    """What the node is. `cgroup` is `v1` or `v2`, `pool` the storage pool's (size, free) in bytes."""
    return NodeFacts(
        hostname=socket.gethostname(),
        architecture=platform.machine(),
        cpus=len(online_cpus()),
        memory=node_memory(),
        disk=pool[0],
        driver=driver,
        driver_version=driver_version,
        storage=storage,
        kernel=platform.release(),
        cgroup=cgroup,
        agent_version=VERSION,
        subnet=subnet,
        capabilities=tuple(capabilities),
        id_map=id_map,
    )


def node_memory() -> int:
    """The node's memory in bytes."""
    return int(psutil.virtual_memory().total)


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _busy() -> float:
    """CPU seconds of all CPUs that were neither idle nor waiting for a disk."""
    times = psutil.cpu_times()
    return sum((times.user, times.nice, times.system, times.irq, times.softirq, times.steal))
