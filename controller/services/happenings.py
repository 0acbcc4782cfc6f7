"""What happens by itself, told as events: nodes that come and go, containers that stop, start, freeze or vanish.

Stands between the link and a listener that takes it over, and compares what was known before with what is after.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping

from common.messages import Hello, Inventory, Samples, StateChanged
from common.states import NodeStatus, Status
from controller.dispatch.listener import LinkListener
from controller.events import Events
from controller.fleet import Fleet

ACTIONS: dict[int, str] = {
    Status.STOPPED: "container-stopped",
    Status.RUNNING: "container-started",
    Status.FROZEN: "container-paused",
    Status.ERROR: "container-failed",
}
"""What is told of a container that is found in this state; what is under way is not told."""


class Happenings:
    """Tells events of what `listener` hears."""

    def __init__(self, listener: LinkListener, fleet: Fleet, events: Events) -> None:
        self._listener = listener
        self._fleet = fleet
        self._events = events

    def hello(self, node: str, hello: Hello) -> None:
        """An agent was let in."""
        self._listener.hello(node, hello)

    def inventory(self, node: str, inventory: Inventory) -> Mapping[str, int] | Awaitable[Mapping[str, int]]:
        """All that a node has; it may have changed while the node was out of reach."""
        live = self._fleet.nodes.get(node)
        # What is known before the first one is what was kept through the controller's restart: it may be old.
        before = {} if live is None or live.images is None else self._known(live.containers)
        answer = self._listener.inventory(node, inventory)
        self._compare(node, before)
        return answer

    def samples(self, node: str, samples: Samples) -> None:
        """New figures are no event."""
        self._listener.samples(node, samples)

    def state_changed(self, node: str, change: StateChanged) -> None:
        """A container changed by itself or by hand."""
        before = self._known([change.container.id])
        self._listener.state_changed(node, change)
        self._compare(node, before)

    def node_status(self, node: str, status: NodeStatus, reason: str) -> None:
        """A node became reachable or not, or the reason is another."""
        live = self._fleet.nodes.get(node)
        before = (live.status, live.reason) if live is not None else None
        self._listener.node_status(node, status, reason)
        if live is not None and (live.status, live.reason) != before:
            action = f"node-{str(live.status).lower()}"
            self._events.note(action, f"/1.0/nodes/{node}", node=node, details={"reason": live.reason})

    def _known(self, containers: Iterable[str]) -> dict[str, int]:
        """What was last reported of those on which no operation works: an operation tells for itself."""
        lives = (self._fleet.containers.get(container) for container in containers)
        return {
            live.record.id: live.report.status
            for live in lives
            if live is not None and live.report is not None and live.record.operation is None
        }

    def _compare(self, node: str, before: Mapping[str, int]) -> None:
        for container, was in before.items():
            live = self._fleet.containers.get(container)
            if live is None or live.record.node != node:
                continue
            now = live.report.status if live.report is not None else None
            action = _action(was, now)
            if now != was and action is not None:
                source = f"/1.0/vz/{container}"
                self._events.note(action, source, container=container, node=node, details={"by": "itself"})


def _action(was: int, now: int | None) -> str | None:
    """What happened to a container that was in one state and is in another, or on its node no more."""
    if now is None:
        return "container-vanished"
    return "container-resumed" if (was, now) == (Status.FROZEN, Status.RUNNING) else ACTIONS.get(now)
