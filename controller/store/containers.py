"""Containers and their snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, func, insert, select, update

from common.errors import Busy, Conflict, NotFound
from common.states import Status
from controller.records import Container, Operation, Phase, Snapshot
from controller.store import models
from controller.store.db import Transaction
from controller.store.rows import Rows

rows = Rows(models.containers, Container, "id")
UNFINISHED = tuple(int(status) for status in Status if not status.final)
_snapshots = Rows(models.snapshots, Snapshot, "name")


@dataclass(frozen=True)
class Reserved:
    """What a node's containers have reserved there: bytes, and how many there are."""

    memory: int = 0
    disk: int = 0
    containers: int = 0


def require(transaction: Transaction, container: str) -> Container:
    """The container. Raises NotFound."""
    record = rows.get(transaction.connection, container)
    if record is None:
        raise NotFound(f"container {container} not found", field="id")
    return record


def require_idle(transaction: Transaction, container: str) -> Container:
    """The container, on which no operation works. Raises NotFound or Busy."""
    record = require(transaction, container)
    if record.operation is not None:
        url = f"/1.0/operations/{record.operation}"
        raise Busy(f"container {container} is busy with another operation", details={"operation": url})
    return record


def require_ready(transaction: Transaction, container: str) -> Container:
    """The container, whole and with no operation at work on it. Raises NotFound, Busy or Conflict."""
    record = require_idle(transaction, container)
    if record.phase is not Phase.READY:
        raise Conflict(f"container {container} is not whole: {record.error}", field="id")
    return record


def on_node(connection: Connection, node: str) -> list[Container]:
    """The containers that belong to a node, by id."""
    query = select(models.containers).where(models.containers.c.node == node).order_by(models.containers.c.id)
    return [rows.decode(row) for row in connection.execute(query)]


def has_address(connection: Connection, hwaddr: str) -> bool:
    """Whether a container has this hardware address."""
    table = models.containers
    return connection.execute(select(table.c.id).where(table.c.hwaddr == hwaddr)).first() is not None


def release(transaction: Transaction, operation: Operation) -> None:
    """The operation works on its containers no more."""
    for container in operation.containers:
        record = rows.get(transaction.connection, container)
        if record is not None and record.operation == operation.id:
            rows.replace(transaction, msgspec.structs.replace(record, operation=None))


def give_up(transaction: Transaction, operation: Operation) -> None:
    """Free its containers when its own end could not be written; what it was creating is not whole."""
    for container in operation.containers:
        record = rows.get(transaction.connection, container)
        if record is not None and record.operation == operation.id:
            failed = record.phase is Phase.CREATING
            freed = msgspec.structs.replace(
                record,
                operation=None,
                phase=Phase.FAILED if failed else record.phase,
                error=operation.error.text if failed and operation.error else record.error,
            )
            rows.replace(transaction, freed)


def reserved_by_node(transaction: Transaction) -> dict[str, Reserved]:
    """The sums that placement needs. A container on the move counts on both of its nodes."""
    table = models.containers
    query = select(
        table.c.node, func.sum(table.c.reserved_memory), func.sum(table.c.reserved_disk), func.count()
    ).group_by(table.c.node)
    found = {node: Reserved(int(m), int(d), n) for node, m, d, n in transaction.connection.execute(query)}
    for node, (memory, disk) in _arriving(transaction.connection):
        there = found.get(node, Reserved())
        found[node] = Reserved(there.memory + memory, there.disk + disk, there.containers + 1)
    return found


def _arriving(connection: Connection) -> list[tuple[str, tuple[int, int]]]:
    """The node that each container under way is moving to, and what it has reserved there."""
    table, operations = models.containers, models.operations
    query = (
        select(operations.c.node, operations.c.parameters)
        .join(table, table.c.operation == operations.c.id)
        .where(operations.c.kind == "container.move", operations.c.node != table.c.node)
        .where(operations.c.status.in_(UNFINISHED))
    )
    return [(node, tuple(parameters["reserved"])) for node, parameters in connection.execute(query)]


def change_id(transaction: Transaction, old: str, record: Container) -> None:
    """Write `record` over the container `old`, whose id it may change; its snapshots follow."""
    table = models.containers
    transaction.connection.execute(update(table).where(table.c.id == old).values(msgspec.to_builtins(record)))
    moved = all_snapshots(transaction.connection, record.id)
    if old != record.id:
        transaction.changed(Container, old, None)
    transaction.changed(Container, record.id, record)
    for snapshot in moved:
        transaction.changed(Snapshot, f"{record.id}/{snapshot.name}", snapshot)


def add_snapshot(transaction: Transaction, snapshot: Snapshot) -> None:
    """Add a snapshot's row."""
    transaction.connection.execute(insert(models.snapshots).values(msgspec.to_builtins(snapshot)))
    transaction.changed(Snapshot, f"{snapshot.container}/{snapshot.name}", snapshot, new=True)


def change_snapshot(transaction: Transaction, container: str, name: str, values: dict[str, Any]) -> None:
    """Write other values into a snapshot's row. Raises NotFound."""
    table = models.snapshots
    statement = update(table).where(table.c.container == container, table.c.name == name).values(values)
    if transaction.connection.execute(statement).rowcount == 0:
        raise NotFound(f"container {container} has no snapshot {name}", field="name")
    called = values.get("name", name)
    query = select(table).where(table.c.container == container, table.c.name == called)
    record = _snapshots.decode(transaction.connection.execute(query).one())
    transaction.changed(Snapshot, f"{container}/{called}", record)


def rename_snapshot(transaction: Transaction, container: str, name: str, new: str) -> None:
    """Give a snapshot's row another name. Raises NotFound, or sqlalchemy's IntegrityError when the name is taken."""
    change_snapshot(transaction, container, name, {"name": new})
    transaction.changed(Snapshot, f"{container}/{name}", None)


def delete_snapshot(transaction: Transaction, container: str, name: str) -> None:
    """Remove a snapshot's row."""
    table = models.snapshots
    transaction.connection.execute(delete(table).where(table.c.container == container, table.c.name == name))
    transaction.changed(Snapshot, f"{container}/{name}", None)


def all_snapshots(connection: Connection, container: str | None = None) -> list[Snapshot]:
    """The snapshots of one container, or of all, oldest first."""
    table = models.snapshots
    query = select(table).order_by(table.c.container, table.c.created_at, table.c.name)
    if container is not None:
        query = query.where(table.c.container == container)
    return [_snapshots.decode(row) for row in connection.execute(query)]
