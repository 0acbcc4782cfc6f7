"""Freezing a container by its outer cgroup, so that nothing inside can thaw it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.cgroups import ContainerCgroup
from agent.cgroups.files import read_keys, read_text, walk, write_text
from common.errors import DeadlinePassed

_TIMEOUT = 10.0
_PAUSE = 0.005


async def freeze(cgroup: ContainerCgroup) -> None:
    """Freeze all its processes, and wait until they are. Raises DriverFailed, DeadlinePassed (then they go on)."""
    try:
        async with asyncio.timeout(_TIMEOUT):
            for directory in _freezers(cgroup):
                _write(directory, frozen=True)
            # The kernel gives no other sign on version 1.
            while not all(_frozen(directory) for directory in _freezers(cgroup)):  # noqa: ASYNC110
                await asyncio.sleep(_PAUSE)
    except TimeoutError:
        thaw(cgroup)
        raise DeadlinePassed(f"the processes could not be frozen within {_TIMEOUT:g} s") from None
    except asyncio.CancelledError:
        thaw(cgroup)
        raise


def thaw(cgroup: ContainerCgroup) -> None:
    """Let its processes go on, also where the container itself has frozen them. Raises DriverFailed."""
    for directory in _freezers(cgroup):
        for below in walk(directory):
            _write(below, frozen=False)


def _freezers(cgroup: ContainerCgroup) -> list[Path]:
    """Version 1's freezer where it is mounted, else version 2's: with both, one would wait for the other."""
    first = [directory for directory in cgroup.directories() if (directory / "freezer.state").exists()]
    return first or [directory for directory in cgroup.directories() if (directory / "cgroup.freeze").exists()]


def _write(directory: Path, frozen: bool) -> None:
    if (directory / "freezer.state").exists():
        write_text(directory / "freezer.state", "FROZEN" if frozen else "THAWED")
    elif (directory / "cgroup.freeze").exists():
        write_text(directory / "cgroup.freeze", "1" if frozen else "0")


def _frozen(directory: Path) -> bool:
    if (directory / "freezer.state").exists():
        return (read_text(directory / "freezer.state") or "").strip() == "FROZEN"
    return read_keys(directory / "cgroup.events").get("frozen") == 1
