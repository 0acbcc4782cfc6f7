"""Operations: accepted, advanced step by step, ended, and kept for days."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from common.states import Status
from controller.records import Operation
from controller.store import models
from controller.store.db import Transaction
from controller.store.rows import Rows

rows = Rows(models.operations, Operation, "id")
FINAL = tuple(int(status) for status in Status if status.final)


def add(transaction: Transaction, operation: Operation) -> None:
    """Accept an operation and index it by its containers."""
    rows.insert(transaction, operation)
    links = [{"operation": operation.id, "container": container} for container in set(operation.containers)]
    if links:
        transaction.connection.execute(insert(models.operation_containers), links)


def unfinished(connection: Connection) -> list[Operation]:
    """Those which have not ended, oldest first."""
    table = models.operations
    query = select(table).where(table.c.status.not_in(FINAL)).order_by(table.c.id)
    return [rows.decode(row) for row in connection.execute(query)]


def find(
    connection: Connection,
    *,
    container: str | None = None,
    node: str | None = None,
    status: Status | None = None,
    limit: int = 1000,
    before: str | None = None,
) -> list[Operation]:
    """The newest operations that match, newest first; `before` is the id after which a page goes on."""
    table = models.operations
    query = select(table).order_by(table.c.id.desc()).limit(limit)
    if container is not None:
        index = models.operation_containers
        query = query.where(table.c.id.in_(select(index.c.operation).where(index.c.container == container)))
    if node is not None:
        query = query.where(table.c.node == node)
    if status is not None:
        query = query.where(table.c.status == int(status))
    if before is not None:
        query = query.where(table.c.id < before)
    return [rows.decode(row) for row in connection.execute(query)]


def unfinished_of(connection: Connection, node: str, kinds: Sequence[str]) -> Operation | None:
    """An operation of one of these kinds that works on a node and has not ended."""
    table = models.operations
    query = select(table).where(table.c.status.not_in(FINAL), table.c.node == node, table.c.kind.in_(kinds)).limit(1)
    row = connection.execute(query).first()
    return None if row is None else rows.decode(row)


def latest_of(connection: Connection, node: str, kinds: Sequence[str], limit: int = 100) -> list[Operation]:
    """The operations of these kinds that work or worked on a node, newest first."""
    table = models.operations
    query = select(table).where(table.c.node == node, table.c.kind.in_(kinds)).order_by(table.c.id.desc()).limit(limit)
    return [rows.decode(row) for row in connection.execute(query)]


def asked_by(connection: Connection, request: str, after: str) -> list[Operation]:
    """The operations that were asked for by a request, oldest first; all of them came after the operation `after`."""
    table = models.operations
    query = select(table).where(table.c.id > after, table.c.request == request).order_by(table.c.id)
    return [rows.decode(row) for row in connection.execute(query)]


def mark_cancelling(transaction: Transaction, operation: str) -> None:
    """Remember through a restart that a cancel was asked for; an operation that has ended stays as it is."""
    table = models.operations
    statement = update(table).where(table.c.id == operation, table.c.status.not_in(FINAL))
    if transaction.connection.execute(statement.values(status=int(Status.CANCELLING))).rowcount:
        transaction.changed(Operation, operation, rows.get(transaction.connection, operation))


def latest(connection: Connection) -> Operation | None:
    """The one that was made last."""
    table = models.operations
    row = connection.execute(select(table).order_by(table.c.id.desc()).limit(1)).first()
    return None if row is None else rows.decode(row)


def prune(transaction: Transaction, ended_before: str, limit: int = 500) -> int:
    """Forget a small batch of operations that ended before then; returns how many.

    Only from the beginning: one that was made after another which is kept has a time by a clock that was wrong.
    """
    table = models.operations
    kept = select(func.min(table.c.id)).where(table.c.ended_at >= ended_before).scalar_subquery()
    older = or_(kept.is_(None), table.c.id < kept)
    old = select(table.c.id).where(table.c.ended_at < ended_before, older).limit(limit)
    ids = list(transaction.connection.execute(old).scalars())
    if ids:
        index = models.operation_containers
        transaction.connection.execute(delete(index).where(index.c.operation.in_(ids)))
        transaction.connection.execute(delete(table).where(table.c.id.in_(ids)))
    return len(ids)


def claiming(connection: Connection, container: str) -> str | None:
    """The unfinished operation that names this container, if there is one."""
    table, index = models.operations, models.operation_containers
    query = (
        select(table.c.id)
        .join(index, index.c.operation == table.c.id)
        .where(index.c.container == container, table.c.status.not_in(FINAL))
        .limit(1)
    )
    found: str | None = connection.execute(query).scalar()
    return found
