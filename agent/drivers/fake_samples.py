"""Simulated figures: plausible, steady for a container, within its limits."""

from __future__ import annotations

import zlib

from agent.drivers.fake_state import FakeContainer, Script
from common.options import parse_config
from common.reports import Address, ContainerSample, Interface, NodeSample

_MB = 10**6


def _share(text: str) -> float:
    """A number from 0 to 1 which belongs to a text."""
    return zlib.crc32(text.encode()) / 2**32


def sample_container(container: FakeContainer, script: Script, now: float) -> ContainerSample:
    """A container's figures at `now` (seconds since 1970); a stopped one has disk figures only."""
    spec = container.spec
    settings = parse_config(spec.config)
    share = _share(spec.id)
    disk_limit = settings.disk
    disk_usage = min(disk_limit or script.disk, int((20 + 80 * share) * _MB))
    if not container.running or container.started_at is None:
        return ContainerSample(spec.id, disk_limit=disk_limit, disk_usage=disk_usage)
    memory_limit = settings.memory_bytes(script.memory)
    memory_usage = min(memory_limit or script.memory, int((8 + 56 * share) * _MB))
    elapsed = max(0.0, now - container.started_at)
    return ContainerSample(
        spec.id,
        disk_limit=disk_limit,
        disk_usage=disk_usage,
        memory_limit=memory_limit,
        memory_usage=memory_usage,
        memory_reclaimable=memory_usage // 4,
        memory_peak=memory_usage,
        swap_usage=0,
        cpu_time=int(elapsed * share * 10**8),
        cpu_load=round(share / 10, 4),
        processes=1 + int(share * 10),
        started_at=container.started_at,
        interfaces=(_interface(spec.hwaddr, elapsed),),
    )


def _interface(hwaddr: str, elapsed: float) -> Interface:
    octets = [int(pair, 16) for pair in hwaddr.split(":")[3:]]
    address = Address("inet", f"10.{octets[0]}.{octets[1]}.{max(1, min(254, octets[2]))}", "8", "global")
    traffic = int(elapsed * 1000)
    return Interface("eth0", hwaddr, 1500, True, None, (address,), traffic, traffic, traffic // 100, traffic // 100)


def sample_node(containers: list[FakeContainer], script: Script, now: float, uptime: float) -> NodeSample:
    """The node's load: what its containers use, and nothing else."""
    samples = [sample_container(container, script, now) for container in containers]
    load = sum(sample.cpu_load or 0.0 for sample in samples)
    return NodeSample(
        memory_free=max(0, script.memory - sum(sample.memory_usage or 0 for sample in samples)),
        disk_free=max(0, script.disk - sum(sample.disk_usage or 0 for sample in samples)),
        cpu_load=min(1.0, load / script.cpus),
        load_average=(load, load, load),
        uptime=uptime,
    )
