"""What a test session must not leave on the machine: processes, namespaces, bridges, loop devices, mounts.

Processes are known by a variable of their environment. The rest is known by the project's names, and counted as this
session's only when it is new and no other test session runs on the machine.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

SESSION_VARIABLE = "VZFLEET_TEST_SESSION"
GRACE = 3.0
# Names that the project or its tests give to bridges and namespaces, and directories where tests keep state.
_OURS = re.compile(r"vz|(^|/)pytest-of-")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Machine:
    """The things on the machine at one time that the project's names mark as its own."""

    namespaces: frozenset[str]
    interfaces: frozenset[str]
    loop_devices: frozenset[str]
    mounts: frozenset[str]

    @classmethod
    def now(cls) -> Machine:
        """Look at the machine."""
        return cls(
            namespaces=_ours(path.name for path in _listed("/run/netns")),
            interfaces=_ours(path.name for path in _listed("/sys/class/net")),
            loop_devices=_ours(_text(path / "loop/backing_file") for path in _listed("/sys/block")),
            mounts=_ours(_mount_points()),
        )


def new_things(before: Machine, after: Machine) -> list[str]:
    """What is there now and was not before, unless it belongs to another test session that still runs."""
    if len(_sessions()) > 1:
        return []
    found = []
    for kind in fields(Machine):
        new = getattr(after, kind.name) - getattr(before, kind.name)
        found += [f"{kind.name}: {name}" for name in sorted(new)]
    return found


def processes_of(session: str) -> list[str]:
    """Processes that this test session started and that still run; those that are just ending get 3 s."""
    deadline = time.monotonic() + GRACE
    while (found := _processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _processes_of(session: str) -> list[str]:
    mark = f"{SESSION_VARIABLE}={session}".encode()
    found = []
    for process in _processes():
        if int(process.name) not in _self_and_parents() and mark in _bytes(process / "environ").split(b"\0"):
            found.append(f"process {process.name}: {_bytes(process / 'cmdline').replace(bytes(1), b' ').decode()}")
    return found


def _sessions() -> set[bytes]:
    """The marks of all test sessions that have a process; this one's own is in its environment since it started one."""
    prefix = f"{SESSION_VARIABLE}=".encode()
    lines = (line for process in _processes() for line in _bytes(process / "environ").split(b"\0"))
    return {line for line in lines if line.startswith(prefix)} | {prefix + os.environb[SESSION_VARIABLE.encode()]}


def _self_and_parents() -> set[int]:
    pids = {os.getpid()}
    pid = os.getppid()
    while pid > 1:
        pids.add(pid)
        pid = int(_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[1])
    return pids


def _processes() -> list[Path]:
    return [path for path in Path("/proc").iterdir() if path.name.isdigit() and _bytes(path / "cmdline")]


def _mount_points() -> list[str]:
    points = (line.split()[4] for line in _text(Path("/proc/self/mountinfo")).splitlines())
    return [_OCTAL.sub(lambda match: chr(int(match[1], 8)), point) for point in points]


def _listed(directory: str) -> list[Path]:
    path = Path(directory)
    return list(path.iterdir()) if path.is_dir() else []


def _ours(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if _OURS.search(name))


def _text(path: Path) -> str:
    return _bytes(path).decode(errors="replace").strip()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
