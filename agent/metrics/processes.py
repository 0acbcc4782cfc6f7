"""What /proc says of a container's init (proc_pid_stat(5))."""

from __future__ import annotations

import os

from agent.cgroups.files import read_text

_TICKS = os.sysconf("SC_CLK_TCK")
_START = 19
"""Place of `starttime` (field 22) among the fields after the command's name."""


def start_time(pid: int, proc: str = "/proc") -> float | None:
    """When a process started, in seconds since the machine did (CLOCK_BOOTTIME); None when it is gone."""
    text = read_text(f"{proc}/{pid}/stat")
    # The command's name is the process's own choice, with blanks and brackets too.
    fields = (text or "").rpartition(")")[2].split()
    return int(fields[_START]) / _TICKS if len(fields) > _START else None
