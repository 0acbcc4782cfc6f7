"""Taking a node down: its containers and what runs for them, and, on demand, everything it ever had."""

from __future__ import annotations

import shutil
from pathlib import Path

from agent.app import boot_record, only_one
from agent.config import AgentConfig
from agent.drivers import create_driver
from common.clock import SystemClock
from common.errors import Conflict

_MOUNTS = Path("/proc/self/mountinfo")


async def down(config: AgentConfig) -> None:
    """Stop all containers and what runs for them. Raises Conflict while the agent runs."""
    with only_one(config.state):
        await create_driver(config, SystemClock()).shut_down()
        # Like a host that was switched off: the next run starts what is to start with the host.
        boot_record(config).forget()


async def purge(config: AgentConfig) -> None:
    """Take it down and remove everything, the state directory too. Raises Conflict when something is still mounted."""
    with only_one(config.state):
        driver = create_driver(config, SystemClock())
        await driver.shut_down()
        await driver.purge()
        mounted = mounts_below(config.state, _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"))
        if mounted:
            raise Conflict(f"{', '.join(mounted)} is still mounted: nothing is removed")
        shutil.rmtree(config.state)


def mounts_below(directory: Path, mountinfo: str) -> list[str]:
    """The mount points at or below a directory, from `/proc/self/mountinfo` (proc(5): fifth field, octal escapes)."""
    root = directory.resolve()
    found = []
    for line in mountinfo.splitlines():
        point = Path(_unescape(line.split(" ")[4]))
        if point == root or root in point.parents:
            found.append(str(point))
    return found


def _unescape(text: str) -> str:
    for escape, mark in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, mark)
    return text
