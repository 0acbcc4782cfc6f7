"""Two nodes with real or fake drivers in one test, and rounds of transfers between them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.config import AgentConfig
from agent.drivers.base import Driver, Format, Incoming, Outgoing
from common.clock import SystemClock
from common.reports import ContainerReport, ContainerSpec
from tests.helpers.busybox import busybox_archive, fingerprint_of
from tests.helpers.channels import MemoryChannel, carried, channel_pair
from tests.lxc import conftest as machine

MIB = 2**20


def spec(id: str, generation: int = 1, hostname: str = "", **config: str) -> ContainerSpec:
    """A container's description; `limits__memory="64MiB"` is the key `limits.memory`."""
    keys = {name.replace("__", "."): value for name, value in config.items()}
    number = sum(id.encode()) % 256
    return ContainerSpec(id, generation, hostname or f"host-{id}", f"00:16:3e:00:02:{number:02x}", keys)


@dataclass
class OneNode:
    """A driver and what it works on."""

    driver: Driver
    config: AgentConfig

    @property
    def pool(self) -> Path:
        """Where its volumes are."""
        point = self.config.state / "pool"
        return point if point.is_mount() else self.config.state / "volumes"

    def rootfs(self, id: str) -> Path:
        """A container's files as the host sees them."""
        return self.pool / "containers" / id / "rootfs"

    def snapshot(self, id: str, name: str) -> Path:
        """A snapshot's files."""
        return self.pool / "snapshots" / id / name / "rootfs"

    def kept(self) -> list[str]:
        """What transfers, and work cut short, have left in the pool."""
        return [str(path) for kind in ("transfers", "staging") for path in (self.pool / kind).glob("*")]

    async def have_image(self, privileged: bool = False) -> str:
        """Unpack busybox."""
        archive = busybox_archive()
        file = self.config.state / "image.tar"
        file.write_bytes(archive)
        fingerprint = fingerprint_of(archive)
        await self.driver.unpack_image(fingerprint, "rootfs", file, privileged, lambda stage, percent: None)
        file.unlink()
        return fingerprint


@dataclass
class TwoNodes:
    """A source and a target, and the format that containers have between them."""

    source: OneNode
    target: OneNode
    format: Format
    transfers: list[str] = field(default_factory=lambda: [secrets.token_hex(8)])
    reported: list[tuple[str, int, int | None]] = field(default_factory=list)

    def begin_another(self) -> None:
        """Have the rounds from now on belong to another transfer."""
        self.transfers.append(secrets.token_hex(8))

    async def round(
        self, received: ContainerSpec, number: int = 0, *, container: str = "101", last: bool = True, **more: Any
    ) -> tuple[MemoryChannel, MemoryChannel]:
        """Carry one round; the ends of the way it went. `cut`, `cut_back`: bytes after which an end cuts it."""
        one, other = channel_pair()
        one.cut_after, other.cut_after = more.pop("cut", None), more.pop("cut_back", None)
        refresh = more.pop("refresh", False)
        outgoing = Outgoing(
            container,
            self.transfers[-1],
            number,
            self.format,
            last,
            **{"moving": True, "with_snapshots": False, **more},
        )
        incoming = Incoming(received, self.transfers[-1], number, self.format, last, refresh)
        sending = self.source.driver.send(outgoing, one, lambda *told: self.reported.append(told))
        await carried(sending, self.target.driver.receive(incoming, other), one)
        return one, other

    async def end(self) -> None:
        """End all transfers on both nodes, twice, as a repeated command does."""
        for node in (self.source, self.target) * 2:
            for transfer in self.transfers:
                await node.driver.end_transfer(transfer)
        assert self.source.kept() == []
        assert self.target.kept() == []


def ignore(_report: ContainerReport, _gone: bool) -> None:
    """Listen to nothing."""


@asynccontextmanager
async def real_node(state: Path, name: str, number: int, **settings: Any) -> AsyncIterator[OneNode]:
    """An open LXC driver."""
    from agent.drivers.lxc.driver import LxcDriver

    names = {"managed_bridge": f"vztbr{number}", "subnet": f"10.91.{20 + number}.0/24", "cgroup": f"{name}-{number}"}
    state = state / str(number)
    state.mkdir(mode=0o711)
    config = AgentConfig(state=state, node=f"test{number}", **{"pool_size": 1024 * MIB, **names, **settings})
    driver = LxcDriver(config, SystemClock())
    try:
        await driver.open(ignore)
        yield OneNode(driver, config)
    finally:
        await driver.shut_down()
        await driver.purge()


@asynccontextmanager
async def two_real_nodes(state: Path, name: str, source: str, target: str, **of_target: Any) -> AsyncIterator[TwoNodes]:
    """Two nodes with these storages; the format is btrfs where both have it and nothing else is asked for.

    They leave nothing on the machine.
    """
    format: Format = of_target.pop("format", "btrfs" if source == target == "btrfs" else "files")
    async with (
        real_node(state, name, 0, storage=source) as one,
        real_node(state, name, 1, storage=target, **of_target) as other,
    ):
        yield TwoNodes(one, other, format)
    for node in (one, other):
        assert machine.leftovers(node.config) == []
        node.config.state.rmdir()
