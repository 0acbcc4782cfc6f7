"""Named points between steps at which a test can make a process fail."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

log = logging.getLogger(__name__)
FailPoints = Callable[[str], None]


def never(_name: str) -> None:
    """The fail points of production: nothing happens."""


def from_environment(variable: str = "VZFLEET_FAILPOINT") -> FailPoints:
    """Fail points as an environment variable says: `name=kill` ends the process there by SIGKILL, at once."""
    wanted = os.environ.get(variable, "")
    if not wanted:
        return never
    name, _, action = wanted.partition("=")
    if action != "kill":
        raise ValueError(f"{variable}: the only action is 'kill', as in container.create/create/done=kill")

    def reach(reached: str) -> None:
        if reached == name:
            log.warning("fail point reached", extra={"failpoint": name})
            os.kill(os.getpid(), signal.SIGKILL)

    return reach
