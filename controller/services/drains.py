"""Draining nodes, so that a host can be worked on, and taking that back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection

from common.clock import Clock
from common.errors import Busy, Conflict, NoPlacement
from common.options import parse_config
from common.states import Status
from controller import placement
from controller.live import LiveContainer
from controller.operations.nodes import DRAIN, RESTORE, DrainParameters, RestoreParameters, Task
from controller.placement import NodeState
from controller.records import Node, NodeMode, Operation
from controller.services.caller import Caller
from controller.services.containers import Containers, wanted_of
from controller.services.moves import Moves
from controller.services.nodes import hostname_prefix
from controller.services.requests import NodeStateBody, RenameBody, StateBody
from controller.services.states import LONGEST_STOP, States
from controller.store import containers as container_rows
from controller.store import nodes as rows
from controller.store import operations as operation_rows
from controller.store.containers import Reserved
from controller.store.db import Transaction

GATHERING = 20.0
"""Seconds after the controller's start in which nodes that do not answer yet may only be on their way back."""
KINDS = (DRAIN.name, RESTORE.name)


class Drains:
    """Accepts drains and restores, and gives their operations what they need (`Evacuation`)."""

    _containers: Containers
    _moves: Moves
    _states: States

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock.monotonic()

    def use(self, containers: Containers, moves: Moves, states: States) -> None:
        """By which containers are moved, stopped and started. To be called before any operation runs."""
        self._containers, self._moves, self._states = containers, moves, states

    # ------------------------------------------------------------ asking

    async def drain(self, caller: Caller, name: str, body: NodeStateBody) -> Operation | list[dict[str, Any]]:
        """Accept a drain, or with `preview` say what it would do. Raises NotFound, Fenced, Unavailable, Busy."""
        move = body.mode != "stop"
        self._containers.nodes.require_reachable(self._containers.nodes.require(name, "name").record.name)
        if body.preview:
            return [self._shown(task) for task in await self._plan(name, move)]
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
        tasks = () if body.mode == "skip" else tuple(await self._drained(name))
        if body.preview:
            return [self._shown(task) for task in tasks]
        if tasks:
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

    # ------------------------------------------------------------ what is to be done

    async def _plan(self, name: str, move: bool) -> list[Task]:
        """What a drain would do now, all of it."""
        lives = self._on(name)
        if not move:
            return [self._stop_task(live) for live in lives]
        return await self._containers.store.read(lambda connection: self._destinations(connection, name, lives))

    def _on(self, name: str) -> list[LiveContainer]:
        fleet = self._containers.fleet
        return [fleet.containers[id] for id in sorted(self._containers.nodes.require(name).containers)]

    def _stop_task(self, live: LiveContainer) -> Task:
        record = live.record
        running = self._containers.is_running(record.id)
        action, reason = ("stop", "it runs") if running else ("leave", "it does not run")
        return Task(record.id, record.generation, action, record.node, reason)

    def _destinations(self, connection: Connection, name: str, lives: Sequence[LiveContainer]) -> list[Task]:
        """Where each would go, one after the other; what the earlier ones take there is counted for the later ones."""
        reserved = container_rows.reserved_by_node(Transaction(connection))
        tasks = []
        for live in lives:
            task = self._destination(reserved, name, live)
            if task.action == "move":
                memory, disk = self._containers.reservation(live.record.config, task.node)
                there = reserved.get(task.node, Reserved())
                reserved[task.node] = Reserved(there.memory + memory, there.disk + disk, there.containers + 1)
            tasks.append(task)
        return tasks

    def _destination(self, reserved: dict[str, Reserved], name: str, live: LiveContainer) -> Task:
        record, nodes = live.record, self._containers.nodes
        states = nodes.states(reserved, hostname_prefix(record.hostname), record.id)
        here = next((state.architecture for state in states if state.name == name), None)
        others = [state for state in states if state.name != name]
        chosen = placement.place(others, wanted_of(parse_config(record.config), None, here), nodes.policy)
        if chosen.node is None:
            return Task(record.id, record.generation, "leave", name, _no_place(others, chosen.reasons))
        return Task(record.id, record.generation, "move", chosen.node, chosen.reasons[chosen.node])

    async def _drained(self, name: str) -> list[Task]:
        """What brings back what was drained since the node was last restored."""
        history = await self._containers.store.read(
            lambda connection: operation_rows.latest_of(connection, name, KINDS)
        )
        tasks: dict[str, Task] = {}
        for operation in history:
            if operation.kind == RESTORE.name:
                break
            for child in reversed(await self.children(operation)):
                task = self._back(child, name)
                if task is not None:
                    tasks.setdefault(task.container, task)
        return [tasks[container] for container in sorted(tasks)]

    def _back(self, child: Operation, name: str) -> Task | None:
        """What takes a child of a drain back; None when it did nothing, or the container is another one by now."""
        live = self._containers.fleet.containers.get(child.containers[0])
        if live is None or child.status is not Status.SUCCESS or live.record.node != child.node:
            return None
        record = live.record
        if child.kind == "container.stop":
            stopped = not self._containers.is_running(record.id) and child.parameters["generation"] == record.generation
            return Task(record.id, record.generation, "start", name, "the drain stopped it") if stopped else None
        moved = child.parameters["new"]["generation"] == record.generation
        return Task(record.id, record.generation, "move", name, "the drain moved it away") if moved else None

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
            for live in self._on(wanted.node)
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
            _request(operation),
        )
        if operation.kind == RESTORE.name:
            task = next(task for task in _restoring(operation) if task.container == container)
            if task.action == "start":
                return await self._states.change(caller, container, StateBody("start"))
            return await self._move(caller, task)
        wanted = _draining(operation)
        if not wanted.move:
            return await self._states.change(caller, container, StateBody("stop", wanted.timeout, wanted.force))
        lives = [self._containers.get(container)]
        self._containers.nodes.require_reachable(wanted.node)
        [task] = await self._containers.store.read(
            lambda connection: self._destinations(connection, wanted.node, lives)
        )
        if task.action == "leave":
            raise NoPlacement(task.reason)
        return await self._move(caller, task)

    async def _move(self, caller: Caller, task: Task) -> Operation:
        return await self._moves.move(caller, task.container, RenameBody(migration=True, node=task.node))

    async def children(self, operation: Operation) -> list[Operation]:
        """The operations that it had begin."""
        request = _request(operation)
        return await self._containers.store.read(
            lambda connection: operation_rows.asked_by(connection, request, operation.id)
        )

    async def ended(self, operation: str) -> Operation:
        """An operation once it has ended."""
        return await self._containers.operations.wait(operation, None)


def _request(operation: Operation) -> str:
    """By which the children are found again: the id of the request that asks for them."""
    return f"{operation.kind}-{operation.id}"


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


def _no_place(others: Sequence[NodeState], reasons: dict[str, str]) -> str:
    if not others:
        return "no node fits: there is no other node"
    return "no node fits: " + "; ".join(f"{node}: {reason}" for node, reason in reasons.items())
