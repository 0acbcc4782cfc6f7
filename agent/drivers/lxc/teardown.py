"""Taking a node's containers down, and removing all that was ever made for them. Works without an open driver."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

from agent.cgroups import Cgroups
from agent.config import AgentConfig
from agent.drivers.lxc import commands, freezer, ids
from agent.drivers.lxc.processes import Finder
from agent.drivers.lxc.records import RECORD
from agent.network import Network
from agent.network.daemon import ended, send
from agent.storage import all_storages
from agent.storage.volumes import finished
from common.errors import DriverFailed
from common.names import CONTAINER_ID
from common.process import run

_END_TIMEOUT = 30.0
_LOCKS = Path("/run/lxc/lock")


async def shut_down(config: AgentConfig) -> None:
    """Kill all containers, end DHCP, remove the managed bridge, unmount the pool. The data stay."""
    cgroups = Cgroups.detect()
    finder = Finder(cgroups, config.cgroup)
    await asyncio.gather(*(_stop(config, cgroups, finder, name) for name in finder.names()))
    await _stop_made_by_hand(config.state / "lxc")
    cgroups.container(config.cgroup).remove()
    await Network(config).shut_down()
    for storage in all_storages(config):
        await storage.shut_down()


async def _stop(config: AgentConfig, cgroups: Cgroups, finder: Finder, container: str) -> None:
    found = finder.find(container)
    if found is not None:
        with contextlib.ExitStack() as stack:
            pidfds = [_open(pid, stack) for pid in (found.init, found.monitor) if pid is not None]
            if pidfds[0] is not None:
                send(pidfds[0], signal.SIGKILL)
            freezer.thaw(cgroups.container(f"{config.cgroup}/{container}"))
            try:
                async with asyncio.timeout(_END_TIMEOUT):
                    await asyncio.gather(*(ended(pidfd) for pidfd in pidfds if pidfd is not None))
            except TimeoutError:
                raise DriverFailed(f"container {container} does not die") from None
    await commands.sweep(cgroups, config.cgroup, container, commands.veth_name(config.state, container))


async def _stop_made_by_hand(directory: Path) -> None:
    """Containers that somebody made in our LXC path stand on our pool and bridge, which are about to go."""
    names = (entry.parent.name for entry in directory.glob("*/config"))
    for name in sorted(name for name in names if CONTAINER_ID.fullmatch(name)):
        if not (directory / name / RECORD).exists() and await commands.state(directory, name) != "STOPPED":
            await run(["lxc-stop", "-P", str(directory), "-n", name, "-k"], timeout=_END_TIMEOUT)


def _open(pid: int, stack: contextlib.ExitStack) -> int | None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    stack.callback(os.close, pidfd)
    return pidfd


async def purge(config: AgentConfig) -> None:
    """After `shut_down`: remove all containers, images and records, and root's right to the ids."""
    for storage in all_storages(config):
        await storage.purge()
    await finished(_remove_files, config)


def _remove_files(config: AgentConfig) -> None:
    for directory in (config.state / "lxc", config.state / "dhcp", _LOCKS / str(config.state / "lxc").lstrip("/")):
        if directory.exists():
            shutil.rmtree(directory)
    for name in ("seccomp.profile", "attach-cable", "network.json"):
        (config.state / name).unlink(missing_ok=True)
    ids.withdraw(ids.IdMap(config.first_id, config.id_count), config.state / ids.MARK)
