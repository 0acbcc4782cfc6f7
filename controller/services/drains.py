"""Draining nodes, so that a host can be worked on, and taking that back."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from common.clock import Clock
from common.errors import Busy, Conflict, NoPlacement
from controller.operations.nodes import DRAIN, RESTORE, DrainParameters, RestoreParameters, Task
from controller.records import Node, NodeMode, Operation
from controller.services.caller import Caller
from controller.services.containers import Containers
from controller.services.drain_plans import KINDS, DrainPlans, request_of
from controller.services.moves import Moves
from controller.services.requests import NodeStateBody, RenameBody, StateBody
from controller.services.states import LONGEST_STOP, States
from controller.store import nodes as rows
from controller.store import operations as operation_rows
from controller.store.db import Transaction

GATHERING = 20.0
"""Seconds after the controller's start in which nodes that do not answer yet may only be on their way back."""


class Drains:
    """Accepts drains and restores, and gives their operations what they need (`Evacuation`)."""

    _containers: Containers
    _moves: Moves
    _states: States
    _plans: DrainPlans

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock.monotonic()

    def use(self, containers: Containers, moves: Moves, states: States) -> None:
        """By which containers are moved, stopped and started. To be called before any operation runs."""
        self._containers, self._moves, self._states = containers, moves, states
        self._plans = DrainPlans(containers)

    # ------------------------------------------------------------ asking

    async def drain(self, caller: Caller, name: str, body: NodeStateBody) -> Operation | list[dict[str, Any]]:
        """Accept a drain, or with `preview` say what it would do. Raises NotFound, Fenced, Unavailable, Busy."""
        move = body.mode != "stop"
        self._containers.nodes.require_reachable(self._containers.nodes.require(name, "name").record.name)
        if body.preview:
            return [self._shown(task) for task in await self._plans.drain(name, move)]
        timeout = LONGEST_STOP if body.timeout < 0 else body.timeout
        parameters = DrainParameters(name, move, timeout, body.force)

        def prepare(transaction: Transaction) -> Operation:
            record = self._idle_node(transaction, name)
            if record.mode is NodeMode.ACTIVE:
                rows.rows.replace(transaction, msgspec.structs.replace(record, mode=NodeMode.DRAINING))
            return self._draft(caller, DRAIN.name, name, parameters)

        return await self._containers.operations.accept(prepare)

    async def restore(self, caller: Caller, name: str, body: NodeStateBody) -> Operation | list[dict[str, Any]]:
        """Accept that the node is used again, and what was drained comes back unless the mode is `skip`.

        Raises NotFound, Conflict (nothing to restore, or fenced and not back), Unavailable, Busy.
        """
        live = self._containers.nodes.require(name, "name")
        _require_drained(live.record)
        tasks = () if body.mode == "skip" else tuple(await self._plans.restore(name))
        if body.preview:
            return [self._shown(task) for task in tasks]
        if tasks or live.fence:  # one that comes back is first rid of what runs elsewhere by now
            self._containers.nodes.require_reachable(name)

        def prepare(transaction: Transaction) -> Operation:
            record = self._idle_node(transaction, name)
            _require_drained(record)
            active = msgspec.structs.replace(record, mode=NodeMode.ACTIVE, fenced_at=None, fenced_by=None)
            rows.rows.replace(transaction, active)
            return self._draft(caller, RESTORE.name, name, RestoreParameters(name, tasks))

        return await self._containers.operations.accept(prepare)

    def _idle_node(self, transaction: Transaction, name: str) -> Node:
        record = rows.require(transaction, name)
        other = operation_rows.unfinished_of(transaction.connection, name, KINDS)
        if other is not None:
            url = f"/1.0/operations/{other.id}"
            raise Busy(f"node {name} is busy with another operation", details={"operation": url})
        return record

    def _draft(
        self, caller: Caller, kind: str, node: str, parameters: DrainParameters | RestoreParameters
    ) -> Operation:
        resources = {"nodes": [f"/1.0/nodes/{node}"]}
        return self._containers.operations.draft(
            caller, kind, containers=(), node=node, parameters=parameters, resources=resources
        )

    def _shown(self, task: Task) -> dict[str, Any]:
        view: dict[str, Any] = {"container": task.container, "action": task.action, "node": task.node or None}
        return {**view, "running": self._containers.is_running(task.container), "reason": task.reason}

    # ------------------------------------------------------------ for the operations (Evacuation)

    async def gathered(self) -> None:
        """Wait after a start for the nodes that were there before, but not for long."""
        left = self._started + GATHERING - self._clock.monotonic()
        await self._containers.nodes.all_reachable(left)

    async def waiting(self, operation: Operation) -> list[str]:
        """The containers on the node (when stopping: those that run), or those that have not come back yet."""
        if operation.kind == RESTORE.name:
            return [task.container for task in _restoring(operation) if self._still(task)]
        wanted = _draining(operation)
        return [
            live.record.id
            for live in self._plans.on(wanted.node)
            if wanted.move or self._containers.is_running(live.record.id)
        ]

    def _still(self, task: Task) -> bool:
        live = self._containers.fleet.containers.get(task.container)
        if live is None or live.record.generation != task.generation:
            return False
        return task.action != "start" or not self._containers.is_running(task.container)

    async def begin(self, operation: Operation, container: str) -> Operation:
        """Accept the operation that moves, stops or starts a container, asked for by whoever asked for all of it."""
        # Should a cancel come meanwhile: what is accepted must also be started.
        return await asyncio.shield(self._begin(operation, container))

    async def _begin(self, operation: Operation, container: str) -> Operation:
        caller = Caller(
            operation.requestor.username,
            "admin",
            operation.requestor.protocol,
            operation.requestor.address,
            request_of(operation),
        )
        if operation.kind == RESTORE.name:
            task = next(task for task in _restoring(operation) if task.container == container)
            if task.action == "start":
                return await self._states.change(caller, container, StateBody("start"))
            return await self._move(caller, RenameBody(migration=True, node=task.node), task)
        wanted = _draining(operation)
        if not wanted.move:
            return await self._states.change(caller, container, StateBody("stop", wanted.timeout, wanted.force))
        self._containers.nodes.require_reachable(wanted.node)
        task = await self._plans.destination(wanted.node, container)
        if task.action == "leave":
            raise NoPlacement(task.reason)
        body = RenameBody(migration=True, node=task.node, timeout=wanted.timeout, force=wanted.force)
        return await self._move(caller, body, task)

    async def _move(self, caller: Caller, body: RenameBody, task: Task) -> Operation:
        return await self._moves.move(caller, task.container, body)

    async def children(self, operation: Operation) -> list[Operation]:
        """The operations that it had begin."""
        return await self._plans.children(operation)

    async def ended(self, operation: str) -> Operation:
        """An operation once it has ended."""
        return await self._containers.operations.wait(operation, None)


def _draining(operation: Operation) -> DrainParameters:
    return msgspec.convert(operation.parameters, DrainParameters)


def _restoring(operation: Operation) -> tuple[Task, ...]:
    return msgspec.convert(operation.parameters, RestoreParameters).tasks


def _require_drained(record: Node) -> None:
    """Raise Conflict for a node that is not to be restored."""
    if record.mode is NodeMode.ACTIVE:
        raise Conflict(f"node {record.name} is neither draining nor fenced", field="action", allowed="drain, fence")
    if record.mode is NodeMode.FENCED:
        raise Conflict(
            f"node {record.name} is fenced and has not come back: start its agent first, so that what was recovered "
            "elsewhere is stopped there",
            field="action",
        )
