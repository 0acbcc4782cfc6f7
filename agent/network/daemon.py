"""A daemon that outlives the agent: known by its pid file, held by a pidfd, so that no other process is signalled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

_STOP_TIMEOUT = 5.0


@contextlib.contextmanager
def running(pid_file: Path, arguments: Sequence[str]) -> Iterator[int | None]:
    """A pidfd of the daemon started with this pid file in its command, whatever the other arguments; None: none runs.

    `arguments` must contain one that names the pid file: `/proc/<pid>/cmdline` is checked for it.
    """
    process = _open(pid_file, [argument for argument in arguments if str(pid_file) in argument])
    try:
        yield process
    finally:
        if process is not None:
            os.close(process)


def _open(pid_file: Path, marks: Sequence[str]) -> int | None:
    pid = _read_pid(pid_file)
    if pid is None:
        return None
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Looked at after the pidfd is held: from here on the number cannot become another process.
    if not marks or not set(marks) <= set(_command(pid)):
        os.close(process)
        return None
    return process


def is_current(pid_file: Path, arguments: Sequence[str]) -> bool:
    """Whether the daemon runs with just these arguments, and in our own network namespace."""
    pid = _read_pid(pid_file)
    if pid is None or _command(pid)[1:] != list(arguments[1:]):
        return False
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino == Path("/proc/self/ns/net").stat().st_ino
    except (FileNotFoundError, ProcessLookupError):
        return False


def _read_pid(pid_file: Path) -> int | None:
    try:
        text = pid_file.read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() and int(text) > 1 else None


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


async def ended(process: int) -> None:
    """Wait until the process of a pidfd has ended (pidfd_open(2): it becomes readable)."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        if not end.done():
            end.set_result(None)

    loop.add_reader(process, readable)
    try:
        await end
    finally:
        loop.remove_reader(process)


async def terminate(process: int) -> None:
    """End a process: SIGTERM, and SIGKILL when that is not enough."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        send(process, number)
        try:
            await asyncio.wait_for(ended(process), _STOP_TIMEOUT)
        except TimeoutError:
            continue
        return


def send(process: int, number: int) -> None:
    """Send a signal; a process that is gone is none to be told."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)
