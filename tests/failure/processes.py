"""A process of a fleet, to be killed, and what the kernel says of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STOP_TIME = 15.0


def until(condition: Callable[[], Any], what: str, seconds: float = 15.0, every: float = 0.01) -> Any:
    """Wait for a condition, asked again every so many seconds; fail naming it when it does not come."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"did not happen within {seconds} s: {what}"
        time.sleep(every)
    return value


class Process:
    """One process of a fleet; what it prints is appended to its log."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._log_before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its pid; a launcher must end in `exec`, so that it is the agent's."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def killed(self) -> bool:
        """Whether it ended by SIGKILL."""
        return self._process.poll() == -signal.SIGKILL

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone. Nothing where it has ended."""
        self._process.kill()
        self._process.wait(STOP_TIME)

    def stop(self) -> int:
        """Ask it to end (SIGTERM); its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def wait(self, seconds: float) -> int:
        """Its exit code (-9: killed). Fails when it does not end in time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {seconds} s") from None

    def descriptors(self) -> int:
        """How many file descriptors it has open."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def resident(self) -> int:
        """Its resident memory in bytes."""
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def has_said(self, text: str) -> bool:
        """Whether a text stands in what it has printed since its start."""
        with self.log.open("rb") as log:
            log.seek(self._log_before)
            return text.encode() in log.read()

    def last_words(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
