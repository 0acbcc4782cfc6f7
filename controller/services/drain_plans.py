"""What a drain does with each container, and what takes a drain back."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from common.options import parse_config
from common.states import Status
from controller import placement
from controller.live import LiveContainer
from controller.operations.nodes import DRAIN, RESTORE, Task
from controller.placement import NodeState
from controller.records import Operation, Phase
from controller.services.containers import Containers, wanted_of
from controller.services.nodes import hostname_prefix
from controller.store import containers as container_rows
from controller.store import operations as operation_rows
from controller.store.containers import Reserved
from controller.store.db import Transaction

KINDS = (DRAIN.name, RESTORE.name)


class DrainPlans:
    """Looks, and changes nothing."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers

    async def drain(self, name: str, move: bool) -> list[Task]:
        """What a drain would do now, all of it."""
        lives = self.on(name)
        if not move:
            return [self._stop_task(live) for live in lives]
        return await self._containers.store.read(lambda connection: self._destinations(connection, name, lives))

    def on(self, name: str) -> list[LiveContainer]:
        """The containers of a node, by id."""
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
        if record.phase is Phase.FAILED:
            return Task(record.id, record.generation, "leave", name, f"it is not whole: {record.error}")
        if live.report is None and nodes.require(name).images is not None:
            return Task(record.id, record.generation, "leave", name, "its node does not have it (drift)")
        states = nodes.states(reserved, hostname_prefix(record.hostname), record.id)
        here = next((state.architecture for state in states if state.name == name), None)
        others = [state for state in states if state.name != name]
        chosen = placement.place(others, wanted_of(parse_config(record.config), None, here), nodes.policy)
        if chosen.node is None:
            return Task(record.id, record.generation, "leave", name, _no_place(others, chosen.reasons))
        return Task(record.id, record.generation, "move", chosen.node, chosen.reasons[chosen.node])

    async def restore(self, name: str) -> list[Task]:
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

    async def destination(self, name: str, container: str) -> Task:
        """Where one container of a node would go now. Raises NotFound."""
        lives = [self._containers.get(container)]
        [task] = await self._containers.store.read(lambda connection: self._destinations(connection, name, lives))
        return task

    async def children(self, operation: Operation) -> list[Operation]:
        """The operations that it had begin."""
        request = request_of(operation)
        return await self._containers.store.read(
            lambda connection: operation_rows.asked_by(connection, request, operation.id)
        )


def request_of(operation: Operation) -> str:
    """By which the children are found again: the id of the request that asks for them."""
    return f"{operation.kind}-{operation.id}"


def _no_place(others: Sequence[NodeState], reasons: dict[str, str]) -> str:
    if not others:
        return "no node fits: there is no other node"
    return "no node fits: " + "; ".join(f"{node}: {reason}" for node, reason in reasons.items())
