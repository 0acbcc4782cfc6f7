"""Processes known by their pid files: whether they run, and how they are ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deploy.lib.console import environment, say

STOP_TIMEOUT = 30.0


_children: list[subprocess.Popen[bytes]] = []
"""Kept, as they live on when this program ends and nobody is to wait for them."""


def spawn(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own that lives on when this program ends; its output goes to `log`."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
            env=environment(),
        )
    _children.append(child)
    return child


def running(pid_file: Path, *words: str) -> int | None:
    """The pid in the file, if that process runs and has all of `words` among its arguments; else None.

    A pid alone proves nothing: after a crash or a reboot it may be anybody's.
    """
    try:
        pid = int(pid_file.read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, ValueError):
        return None
    return pid if all(word in arguments for word in words) else None


def end(pid_file: Path, *words: str) -> bool:
    """End the process of a pid file and wait until it is gone; returns whether there was one.

    It is asked by SIGTERM, and killed when it has not ended in 30 s.
    """
    pid = running(pid_file, *words)
    if pid is not None:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            _end(handle, pid)
        finally:
            os.close(handle)
    pid_file.unlink(missing_ok=True)
    return pid is not None


def _end(handle: int, pid: int) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(handle, sign)
        except ProcessLookupError:
            return
        if _ended(handle, STOP_TIMEOUT):
            return
        say(f"process {pid} did not end within {STOP_TIMEOUT:g} s of {sign.name}")


def _ended(handle: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
