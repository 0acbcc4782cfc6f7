"""Hears at once when a container's init ends, by its pidfd (pidfd_open(2)): no polling, and no mistaken process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

from agent.drivers.lxc.processes import Processes


@dataclass(frozen=True)
class Watched:
    """A running container and the pidfds of its processes."""

    processes: Processes
    init: int
    monitor: int | None
    over: asyncio.Event
    """Set when its init has ended."""

    def close(self) -> None:
        """Let go of the descriptors."""
        os.close(self.init)
        if self.monitor is not None:
            os.close(self.monitor)


class Watch:
    """The running containers. `ended` is called with a container's id and what was known when its init ends."""

    def __init__(self, ended: Callable[[str, Watched], None]) -> None:
        self._ended = ended
        self._watched: dict[str, Watched] = {}

    def add(self, container: str, processes: Processes) -> bool:
        """Watch a container from now on; False when its init is gone already."""
        self.remove(container)
        try:
            init = os.pidfd_open(processes.init)
        except ProcessLookupError:
            return False
        watched = Watched(processes, init, _open(processes.monitor), asyncio.Event())
        self._watched[container] = watched
        asyncio.get_running_loop().add_reader(init, self._readable, container)
        return True

    def _readable(self, container: str) -> None:
        watched = self._watched.pop(container)
        asyncio.get_running_loop().remove_reader(watched.init)
        watched.over.set()
        self._ended(container, watched)

    def get(self, container: str) -> Watched | None:
        """A running container, None when it does not run."""
        return self._watched.get(container)

    def all(self) -> dict[str, Watched]:
        """All running containers."""
        return dict(self._watched)

    def remove(self, container: str) -> None:
        """Watch it no longer. Unknown is fine."""
        watched = self._watched.pop(container, None)
        if watched is not None:
            asyncio.get_running_loop().remove_reader(watched.init)
            watched.close()

    def close(self) -> None:
        """Watch nothing any more."""
        for container in list(self._watched):
            self.remove(container)


def _open(pid: int | None) -> int | None:
    if pid is None:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
