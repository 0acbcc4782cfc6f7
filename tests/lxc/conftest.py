"""Real containers for tests: each test has a network namespace, cgroups, a pool and a state directory of its own."""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.cgroups import Cgroups
from agent.config import AgentConfig
from agent.drivers.lxc.driver import LxcDriver
from common.clock import SystemClock
from common.reports import ContainerReport, ContainerSpec
from tests.helpers.busybox import busybox_archive, fingerprint_of

MIB = 1024 * 1024
_NEWNET = 0x40000000


@dataclass
class Node:
    """One open LXC driver and what a test needs around it."""

    driver: LxcDriver
    config: AgentConfig
    heard: list[tuple[ContainerReport, bool]] = field(default_factory=list)
    image: str = ""

    def spec(self, id: str = "101", generation: int = 1, hostname: str = "", **config: str) -> ContainerSpec:
        """A container's description; `limits__memory="64MiB"` is the key `limits.memory`."""
        keys = {name.replace("__", "."): value for name, value in config.items()}
        number = sum(id.encode()) % 256
        return ContainerSpec(id, generation, hostname or f"host-{id}", f"00:16:3e:00:00:{number:02x}", keys)

    async def have_image(self, privileged: bool = False, archive: bytes | None = None) -> str:
        """Unpack an image, busybox unless another is given."""
        archive = archive or busybox_archive()
        fingerprint = fingerprint_of(archive)
        file = self.config.state / f"{fingerprint}.tar"
        file.write_bytes(archive)
        try:
            await self.driver.unpack_image(fingerprint, "rootfs", file, privileged, lambda stage, percent: None)
        finally:
            file.unlink()
        return fingerprint

    async def running(self, id: str = "101", **config: str) -> int:
        """Create and start a container; the pid of its init."""
        await self.driver.create(self.spec(id, **config), self.image)
        await self.driver.start(id)
        pid = (await self.driver.inspect(id)).pid
        assert pid is not None
        return pid

    def attach(self, id: str, *command: str, timeout: float = 20) -> subprocess.CompletedProcess[str]:
        """Run a program inside a container, with all of its restrictions."""
        arguments = ["lxc-attach", "-P", str(self.config.state / "lxc"), "-n", id, "--clear-env", "--", *command]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout)

    def rootfs(self, id: str = "101") -> Path:
        """A container's files as the host sees them."""
        pool = self.config.state / "pool"
        root = pool if pool.is_mount() else self.config.state / "volumes"
        return root / "containers" / id / "rootfs"

    def hear(self, report: ContainerReport, gone: bool) -> None:
        """Keep what the driver reports of its own accord."""
        self.heard.append((report, gone))


async def until(condition: Callable[[], Any], timeout: float = 10) -> Any:
    """Wait until a condition holds, and return what it gave."""
    async with asyncio.timeout(timeout):
        while True:
            result = condition()
            if isinstance(result, Awaitable):
                result = await result
            if result:
                return result
            await asyncio.sleep(0.02)


@contextmanager
def network_namespace() -> Iterator[str]:
    """The process is in a network namespace of its own, until the end of the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    name = f"vzt-{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    own = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libc.setns(own, _NEWNET) == 0
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
        yield name
    finally:
        assert libc.setns(before, _NEWNET) == 0
        os.close(before)
        os.close(own)
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=10)


@pytest.fixture
def own_network() -> Iterator[str]:
    """The test's process is in a network namespace of its own."""
    with network_namespace() as name:
        yield name


@contextmanager
def state_place() -> Iterator[Path]:
    """A place for a node's state; not in pytest's own, which each new session closes to containers' mapped roots."""
    directory = Path(tempfile.mkdtemp(prefix="vzt-", dir="/var/tmp"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        directory.rmdir()


@pytest.fixture
def state_directory() -> Iterator[Path]:
    """A place for a node's state."""
    with state_place() as directory:
        yield directory


def make_config(state: Path, name: str, **settings: Any) -> AgentConfig:
    """Settings of a node whose names are the test's own."""
    values = {"managed_bridge": "vztbr0", "subnet": "10.91.7.0/24", "pool_size": 1024 * MIB, "storage": "btrfs"}
    return AgentConfig(state=state, node="test", cgroup=name, **(values | settings))


@asynccontextmanager
async def open_node(config: AgentConfig) -> AsyncIterator[Node]:
    """An open driver with the busybox image, taken down at the end of the block."""
    driver = LxcDriver(config, SystemClock())
    made = Node(driver, config)
    try:
        await driver.open(made.hear)
        made.image = await made.have_image()
        yield made
    finally:
        await driver.shut_down()
        await driver.purge()
    assert leftovers(config) == []


@pytest.fixture(params=["btrfs"])
async def node(request: pytest.FixtureRequest, state_directory: Path, own_network: str) -> AsyncIterator[Node]:
    """An open driver with the busybox image; `indirect` chooses the storage."""
    async with open_node(make_config(state_directory, own_network, storage=request.param)) as made:
        yield made


def leftovers(config: AgentConfig) -> list[str]:
    """What a node that was taken down has left on the machine."""
    found = [f"file {path}" for path in config.state.iterdir()]
    found += [
        f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(config.state) in line
    ]
    found += [f"cgroup {path}" for path in Cgroups.detect().container(config.cgroup).directories() if path.exists()]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found += [f"loop device {backing}"] if str(config.state) in backing.read_text() else []
        except OSError:
            continue  # it went meanwhile
    shown = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True, timeout=10).stdout
    found += [f"interface {line}" for line in shown.splitlines() if "vz" in line]
    return found
