"""`lxc-start`, why it failed, and sweeping what a failed start leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
from pathlib import Path

from agent.cgroups import Cgroups
from agent.network.daemon import ended, send
from common.errors import DriverFailed, VzfleetError
from common.process import run

START_TIMEOUT = 60.0
_TIMEOUT = 10.0
_MAX_LOG = 64 * 1024
# Without newuidmap and newgidmap in it LXC, being root, writes the id maps itself: four programs fewer a start.
_START_PATH = "/usr/sbin:/sbin"
# "lxc-start 101 20260101120000.000 ERROR    start - ../src/lxc/start.c:start:2197 - the reason"
_ERROR = re.compile(r"^lxc-start \S+ \S+ (?:ERROR|CRIT|ALERT|FATAL) +\S+ - \S+:\d+ - (.*)$", re.MULTILINE)


async def start(directory: Path, container: str) -> None:
    """Start a container of the LXC path `directory`. Raises DriverFailed with LXC's own reason, DeadlinePassed."""
    log = directory / container / "start.log"
    log.unlink(missing_ok=True)
    program = shutil.which("lxc-start") or "lxc-start"
    arguments = [program, "-P", str(directory), "-n", container, "-d", "-l", "ERROR", "-o", str(log)]
    done = await run(arguments, timeout=START_TIMEOUT, check=False, environment={"PATH": _START_PATH})
    if done.code != 0:
        raise DriverFailed(f"container {container} does not start: {reason(log, done.errors)}")


def reason(log: Path, printed: str) -> str:
    """What LXC logged first: the cause, of which the rest are consequences."""
    try:
        with log.open(errors="replace") as file:
            found = _ERROR.findall(file.read(_MAX_LOG))
    except FileNotFoundError:
        found = []
    text = "; ".join(found[:2]) or printed.strip() or "lxc-start says nothing"
    return "".join(mark if mark.isprintable() else " " for mark in text)[:600]


async def state(directory: Path, container: str) -> str:
    """LXC's name for the state of a container that was made by hand, such as `RUNNING`."""
    arguments = ["lxc-info", "-P", str(directory), "-n", container, "-s", "-H"]
    done = await run(arguments, timeout=_TIMEOUT, check=False)
    return done.output.strip()


async def version() -> str:
    """LXC's version."""
    return (await run(["lxc-start", "--version"], timeout=_TIMEOUT)).output.strip()


def veth_name(state: Path, container: str) -> str:
    """The host's end of a container's network cable: the same at every start, and of no other node of the machine."""
    return "vz" + hashlib.sha256(f"{state}\0{container}".encode()).hexdigest()[:12]


async def sweep(cgroups: Cgroups, base: str, container: str, veth: str) -> None:
    """Remove what is left of a container that does not run: processes, cgroups, the veth."""
    monitor, payload = cgroups.container(f"{base}/.monitor/{container}"), cgroups.container(f"{base}/{container}")
    for pid in {*monitor.pids(), *payload.pids()}:
        await _kill(pid)
    payload.remove()
    monitor.remove()
    if _exists(veth):
        with contextlib.suppress(VzfleetError):
            # It goes by itself with the network namespace of the container; whoever comes second finds nothing.
            await run(["ip", "link", "delete", "dev", veth], timeout=_TIMEOUT)


async def _kill(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        send(process, signal.SIGKILL)
        async with asyncio.timeout(_TIMEOUT):
            await ended(process)
    except TimeoutError:
        raise DriverFailed(f"process {pid} does not end") from None
    finally:
        os.close(process)


def _exists(interface: str) -> bool:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True
