"""A small network and plain lxc-* commands, to see that an image boots, without the agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from agent.drivers.lxc import ids
from common import process

FIRST_ID = 1_000_000
MAP = ["-m", f"u:0:{FIRST_ID}:65536", "-m", f"g:0:{FIRST_ID}:65536"]
GATEWAY = "10.213.77.1"
ADDRESS = "10.213.77.20"
HWADDR = "00:16:3e:d1:ba:01"
CGROUPS = Path("/sys/fs/cgroup")


class Machine:
    """One network namespace with a bridge and DHCP, and at most one unprivileged container in it."""

    def __init__(self, name: str, state: Path) -> None:
        self.name = name
        self.state = state
        self.pid = 0

    async def inside(self, *arguments: str, timeout: float = 60, check: bool = True) -> process.Completed:
        """Run a program of the host in the network namespace."""
        return await process.run(
            ["nsenter", f"--net=/run/netns/{self.name}", "--", *arguments], timeout=timeout, check=check
        )

    async def lxc(self, command: str, *arguments: str, timeout: float = 60, check: bool = True) -> process.Completed:
        """Run `lxc-<command>` for the container."""
        own = [f"lxc-{command}", "-P", str(self.state), "-n", "c"]
        return await self.inside(*own, *arguments, timeout=timeout, check=check)

    async def attach(self, *arguments: str, timeout: float = 60, check: bool = True) -> process.Completed:
        """Run a program inside the container, its environment cleared."""
        return await self.lxc("attach", "--clear-env", "--", *arguments, timeout=timeout, check=check)

    async def unpack(self, image: Path) -> None:
        """Unpack an image as the mapped root would."""
        root = self.state / "c" / "rootfs"
        root.mkdir(parents=True)
        root.parent.chmod(0o711)
        os.chown(root, FIRST_ID, FIRST_ID)
        packed = image.read_bytes()
        flags = "-xzf" if packed.startswith(b"\x1f\x8b") else "-xf"
        command = ["lxc-usernsexec", *MAP, "--", "tar", "--numeric-owner", flags, "-", "-C", str(root)]
        await process.run(command, timeout=300, input=packed)

    async def start(self, halt_signal: str) -> None:
        """Start the container; `pid` is its init's."""
        hook = self.state / "attach-veth"
        hook.write_text('#!/bin/sh\nexec ip link set "$5" master br0 up\n')
        hook.chmod(0o755)
        (self.state / "c" / "config").write_text(self._config(hook, halt_signal))
        await self.lxc("start", "-o", str(self.state / "log"), "-l", "INFO")
        self.pid = int((await self.lxc("info", "-pH")).output)

    def _config(self, hook: Path, halt_signal: str) -> str:
        lines = [
            "lxc.include = /usr/share/lxc/config/userns.conf",
            "lxc.uts.name = image-test",
            f"lxc.rootfs.path = dir:{self.state}/c/rootfs",
            f"lxc.idmap = u 0 {FIRST_ID} 65536",
            f"lxc.idmap = g 0 {FIRST_ID} 65536",
            "lxc.mount.auto = proc:mixed sys:mixed cgroup:mixed",
            # Without it there is no /dev/ptmx, and systemd's services with PrivateDevices fail.
            "lxc.pty.max = 1024",
            "lxc.seccomp.profile = /usr/share/lxc/config/common.seccomp",
            "lxc.net.0.type = veth",
            "lxc.net.0.name = eth0",
            "lxc.net.0.flags = up",
            f"lxc.net.0.hwaddr = {HWADDR}",
            f"lxc.net.0.script.up = {hook}",
            f"lxc.cgroup.dir.container = {self.name}/c",
            f"lxc.cgroup.dir.monitor = {self.name}/m",
            f"lxc.cgroup.dir.monitor.pivot = {self.name}/p",
            f"lxc.signal.halt = {halt_signal}",
        ]
        parameter = Path("/sys/module/apparmor/parameters/enabled")
        if parameter.exists() and parameter.read_text().startswith("Y"):
            lines.append("lxc.apparmor.profile = unconfined")
        return "\n".join(lines) + "\n"

    def has_address(self) -> bool:
        """Whether the container has its reserved address."""
        return f" {ADDRESS}\n" in Path(f"/proc/{self.pid}/net/fib_trie").read_text()

    async def state_name(self) -> str:
        """The container's state as LXC names it: RUNNING, STOPPED."""
        return (await self.lxc("info", "-sH")).output.strip()


async def until(condition: Callable[[], bool], timeout: float) -> None:
    """Wait until a condition holds; raises TimeoutError."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - nothing tells when a container's address changes
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def image_machine() -> AsyncIterator[Machine]:
    """Set it up, and leave nothing of it."""
    name = f"vzimg{secrets.token_hex(3)}"
    state = Path(tempfile.mkdtemp(prefix=f"{name}-", dir="/var/tmp"))
    state.chmod(0o711)
    machine = Machine(name, state)
    dnsmasq: asyncio.subprocess.Process | None = None
    own = ids.IdMap(FIRST_ID, 65536)
    ids.allow(own, state / ids.MARK)
    try:
        await process.run(["ip", "netns", "add", name], timeout=10)
        for line in (
            "link set lo up",
            "link add br0 type bridge",
            f"address add {GATEWAY}/24 dev br0",
            "link set br0 up",
        ):
            await machine.inside("ip", *line.split())
        dnsmasq = await asyncio.create_subprocess_exec(*_dnsmasq(machine), stdin=asyncio.subprocess.DEVNULL)
        yield machine
    finally:
        ids.withdraw(own, state / ids.MARK)
        await _take_down(machine, dnsmasq)


def _dnsmasq(machine: Machine) -> list[str]:
    return [
        *("nsenter", f"--net=/run/netns/{machine.name}", "--", "dnsmasq", "--keep-in-foreground"),
        *("--conf-file=/dev/null", "--interface=br0", "--bind-interfaces", "--no-resolv", "--no-hosts", "--no-ping"),
        *("--dhcp-authoritative", "--user=root", f"--dhcp-range={ADDRESS},static,255.255.255.0"),
        *(f"--dhcp-host={HWADDR},{ADDRESS}", f"--dhcp-leasefile={machine.state}/leases"),
        *(f"--pid-file={machine.state}/dnsmasq.pid", f"--log-facility={machine.state}/dnsmasq.log"),
        "--domain=containers.test",
    ]


async def _take_down(machine: Machine, dnsmasq: asyncio.subprocess.Process | None) -> None:
    if (machine.state / "c" / "config").exists():
        await machine.lxc("stop", "-k", check=False)
    if dnsmasq is not None:
        with contextlib.suppress(ProcessLookupError):
            dnsmasq.send_signal(signal.SIGTERM)
        await dnsmasq.wait()
    await process.run(["ip", "netns", "delete", machine.name], timeout=10, check=False)
    for hierarchy in (CGROUPS, *CGROUPS.iterdir()):
        _remove_cgroups(hierarchy / machine.name)
    shutil.rmtree(machine.state)


def _remove_cgroups(directory: Path) -> None:
    if directory.is_dir():
        for path in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
            path.rmdir()
        directory.rmdir()
