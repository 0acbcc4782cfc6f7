"""Tells of drift and of containers of nobody's, as events: when they are found, and when they are gone."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from controller import deviations
from controller.drift import Drift
from controller.events import Events
from controller.fleet import Fleet


class Notices:
    """Looks again at what changed in the fleet (`Watch`), once for all changes of a turn of the event loop.

    It remembers what it has told since the controller's start: what still stands then is told again.
    """

    def __init__(self, fleet: Fleet, events: Events) -> None:
        self._fleet = fleet
        self._events = events
        self._containers: set[str] = set()
        self._nodes: set[str] = set()
        self._drifted: dict[str, tuple[Drift, ...]] = {}
        self._unmanaged: dict[str, dict[str, int]] = {}
        self._due: asyncio.Handle | None = None

    def close(self) -> None:
        """Look no more."""
        self._fleet.watch = None
        if self._due is not None:
            self._due.cancel()

    def container_changed(self, container: str) -> None:
        """It is looked at soon."""
        self._containers.add(container)
        self._plan()

    def unmanaged_changed(self, node: str) -> None:
        """It is looked at soon."""
        self._nodes.add(node)
        self._plan()

    def _plan(self) -> None:
        if self._due is None:
            self._due = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._due = None
        containers, self._containers = self._containers, set()
        nodes, self._nodes = self._nodes, set()
        for container in sorted(containers):
            self._look_at(container)
        for node in sorted(nodes):
            self._look_around(node)

    def _look_at(self, container: str) -> None:
        live = self._fleet.containers.get(container)
        if live is None:
            self._drifted.pop(container, None)
            return
        if not deviations.can_tell(self._fleet, live):
            return  # what was told stands until more is known
        found, told = deviations.drift_of(self._fleet, live), self._drifted.get(container, ())
        if found == told:
            return
        details: dict[str, Any] = {"drift": msgspec.to_builtins(found or told)}
        action = "container-drifted" if found else "container-drift-cleared"
        self._events.note(action, f"/1.0/vz/{container}", container=container, node=live.record.node, details=details)
        if found:
            self._drifted[container] = found
        else:
            del self._drifted[container]

    def _look_around(self, name: str) -> None:
        node = self._fleet.nodes.get(name)
        reports = deviations.unmanaged(self._fleet, node) if node is not None else []
        found, told = {report.id: report.generation for report in reports}, self._unmanaged.get(name, {})
        for container in sorted(told.keys() | found.keys()):
            if container not in told:
                self._tell("container-unmanaged-found", name, container, found[container])
            elif container not in found:
                self._tell("container-unmanaged-gone", name, container, told[container])
        if found:
            self._unmanaged[name] = found
        else:
            self._unmanaged.pop(name, None)

    def _tell(self, action: str, node: str, container: str, generation: int) -> None:
        self._events.note(
            action,
            f"/1.0/vz/{container}",
            container=container,
            node=node,
            details={"container": container, "generation": generation},
        )
