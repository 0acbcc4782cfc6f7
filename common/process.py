"""Programs of the host as subprocesses: argument lists, never a shell; a time-out; bounded output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import DeadlinePassed, DriverFailed

MAX_OUTPUT = 1024 * 1024
_LONGEST_LINE = 200


@dataclass(frozen=True)
class Completed:
    """How a program ended and what it printed."""

    code: int
    output: str
    errors: str


def watch_by_descriptor() -> None:
    """Have the end of a subprocess told by its pidfd; Python 3.11's own way is a thread for each."""
    if sys.version_info < (3, 12):
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


async def run(
    arguments: Sequence[str],
    *,
    timeout: float,
    check: bool = True,
    input: bytes | None = None,
    environment: Mapping[str, str] | None = None,
) -> Completed:
    """Run a program to its end, within `timeout` seconds; on cancellation it is killed with its children.

    `environment` goes over our own; a PATH in it is also where the program is looked for.
    Raises DriverFailed when `check` and it ends with an error or cannot be started, DeadlinePassed at the time-out.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE if input is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
        )
    except OSError as error:
        raise DriverFailed(f"{arguments[0]} cannot be started: {error.strerror}") from None
    try:
        async with asyncio.timeout(timeout):
            output, errors = await process.communicate(input)
    except TimeoutError:
        raise DeadlinePassed(f"{arguments[0]} did not end within {timeout:g} s") from None
    finally:
        await end(process)
    done = Completed(
        process.returncode or 0,
        output[:MAX_OUTPUT].decode(errors="replace"),
        errors[:MAX_OUTPUT].decode(errors="replace"),
    )
    if check and done.code != 0:
        raise DriverFailed(f"{arguments[0]} ended with code {done.code}: {_short(done.errors or done.output)}")
    return done


async def end(process: asyncio.subprocess.Process) -> None:
    """Make sure that a program, started in a session of its own, is gone with its children; it may have ended already.

    What it printed and nobody read is thrown away: with a full pipe that nobody reads, `wait` would never return
    (it waits for the pipes' ends too).
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for descriptor in (1, 2):
        pipe = process._transport.get_pipe_transport(descriptor)  # type: ignore[attr-defined]
        if pipe is not None:
            pipe.close()
    await process.wait()
    if process.stdin is not None:
        if not process.stdin.is_closing():
            process.stdin.transport.abort()
        # Python 3.11 complains of a broken pipe that nobody asked for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await process.stdin.wait_closed()


def shortened(line: str) -> str:
    """A line without its middle where it is long: what is wrong stands at its end, after a name."""
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 3]}...{line[-_LONGEST_LINE // 2 :]}"


def _short(text: str) -> str:
    lines = [shortened(line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "it printed nothing"
