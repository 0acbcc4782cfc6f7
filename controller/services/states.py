"""Starting, stopping, restarting, freezing, unfreezing."""

from __future__ import annotations

import msgspec

from common.errors import Conflict, InvalidRequest
from common.states import Status
from controller.live import LiveContainer
from controller.operations.power import STATUS_OF
from controller.operations.states import StateParameters
from controller.records import Operation, Phase, Power
from controller.services.caller import Caller
from controller.services.containers import Containers
from controller.services.requests import StateBody
from controller.store import containers as rows
from controller.store.db import Transaction

LONGEST_STOP = 600.0
"""What a time-out of -1 means, in seconds."""

# Which action is refused in which status, and the reason as LXD words it.
REFUSED: dict[str, dict[Status, str]] = {
    "start": {Status.RUNNING: "The container is already running"},
    "stop": {Status.STOPPED: "The container is already stopped"},
    "restart": {Status.STOPPED: "The container is not running"},
    "freeze": {Status.STOPPED: "The container is not running", Status.FROZEN: "The container is already frozen"},
    "unfreeze": {Status.STOPPED: "The container is not running", Status.RUNNING: "The container is not frozen"},
}

LEFT_AS = {"start": Power.RUNNING, "stop": Power.STOPPED, "freeze": Power.FROZEN, "unfreeze": Power.RUNNING}


class States:
    """Changes of a container's state."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers

    async def change(self, caller: Caller, container: str, body: StateBody) -> Operation:
        """Accept an action. Raises NotFound, InvalidRequest (it makes no sense now), Busy, Unavailable, Conflict."""
        live = self._ready(container)
        self._check_action(live, body)
        timeout = LONGEST_STOP if body.timeout < 0 else body.timeout

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            parameters = StateParameters(container, record.node, record.generation, timeout, body.force)
            operation = self._containers.operations.draft(
                caller,
                f"container.{body.action}",
                containers=(container,),
                node=record.node,
                parameters=parameters,
                extra_time=0 if body.force else timeout,
            )
            rows.rows.replace(transaction, msgspec.structs.replace(record, operation=operation.id))
            return operation

        return await self._containers.operations.accept(prepare)

    def _check_action(self, live: LiveContainer, body: StateBody) -> None:
        status = self._containers.fleet.status_of(live).status
        reason = REFUSED[body.action].get(status)
        if live.record.operation is None and reason is not None and not _settles(live, status, body.action):
            raise InvalidRequest(reason, field="action", allowed=_sensible(status))
        if status is Status.FROZEN and body.action in ("stop", "restart") and not body.force:
            raise InvalidRequest(
                "a frozen container cannot stop by itself", field="action", allowed="unfreeze it first, or force"
            )

    def _ready(self, container: str) -> LiveContainer:
        live = self._containers.get(container)
        if live.record.phase is Phase.FAILED:
            raise Conflict(f"container {container} is not whole: {live.record.error}", field="id")
        self._containers.nodes.require_reachable(live.record.node)
        return live


def _settles(live: LiveContainer, status: Status, action: str) -> bool:
    """Whether an action finds its container as it makes it, by hand, so that it becomes what it is to be."""
    power = LEFT_AS.get(action)
    return power is not None and STATUS_OF[power] is status and live.record.power not in (None, power)


def _sensible(status: Status) -> str:
    actions = [action for action, refused in REFUSED.items() if status not in refused]
    return f"{', '.join(actions)} while it is {status.text}"
