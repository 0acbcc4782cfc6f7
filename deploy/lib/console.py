"""What the person at the terminal sees, how commands are run, and how a condition is waited for."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence

_started = time.monotonic()
POLL_INTERVAL = 0.05
_PYTHON_OVERRIDES = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


class DeployError(Exception):
    """Something that the person at the terminal has to know or to do; its text is all they see."""


def say(text: str) -> None:
    """Show a step with the seconds since the start."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", flush=True)


def environment(**more: str) -> dict[str, str]:
    """The environment for programs: this one's, with plain messages, Debian's paths and without Python's overrides."""
    kept = {name: value for name, value in os.environ.items() if name not in _PYTHON_OVERRIDES}
    path = f"{kept.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
    return {**kept, "PATH": path.lstrip(":"), "LC_ALL": "C.UTF-8", **more}


def run(arguments: Sequence[str], *, timeout: float = 60, check: bool = True, **more: str) -> str:
    """Run a program to its end and return what it printed; `more` are variables of its environment.

    Raises DeployError with the last lines of its output when it fails and `check` is set, or at the time-out (seconds).
    """
    try:
        done = subprocess.run(
            list(arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment(**more),
        )
    except FileNotFoundError:
        raise DeployError(f"{arguments[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise DeployError(f"{' '.join(arguments[:4])} did not end within {timeout:g} s") from None
    if check and done.returncode != 0:
        raise DeployError(f"{' '.join(arguments[:6])} failed:\n{tail(done.stderr or done.stdout)}")
    return done.stdout


def succeeds(arguments: Sequence[str], *, timeout: float = 60) -> bool:
    """Whether a program ends well."""
    done = subprocess.run(
        list(arguments), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, env=environment()
    )
    return done.returncode == 0


def tail(text: str, lines: int = 15) -> str:
    """The last lines of a text, indented."""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Ask `condition` until it holds (True) or `timeout` seconds have passed (False)."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True
