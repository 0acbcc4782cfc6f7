"""Nodes, the tokens by which they join, and the last figures that they sent."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select

from common.errors import NotFound
from controller.records import JoinToken, Node
from controller.store import models
from controller.store.db import Transaction
from controller.store.rows import Rows

rows = Rows(models.nodes, Node, "name")
join_tokens = Rows(models.join_tokens, JoinToken, "hash")


def require(transaction: Transaction, name: str) -> Node:
    """The node. Raises NotFound."""
    record = rows.get(transaction.connection, name)
    if record is None:
        raise NotFound(f"node {name} not found", field="name")
    return record


def by_key(connection: Connection, public_key: str) -> Node | None:
    """The node with this CURVE key."""
    row = connection.execute(select(models.nodes).where(models.nodes.c.public_key == public_key)).first()
    return None if row is None else rows.decode(row)


def drop_expired_join_tokens(transaction: Transaction, now: str) -> None:
    """Forget join tokens that can no longer be used."""
    table = models.join_tokens
    transaction.connection.execute(delete(table).where(table.c.expires_at < now))


def save_samples(transaction: Transaction, node: str, received_at: str, body: Any) -> None:
    """Keep a node's last figures for after a restart."""
    table = models.last_samples
    transaction.connection.execute(delete(table).where(table.c.node == node))
    transaction.connection.execute(insert(table).values(node=node, received_at=received_at, body=body))


def saved_samples(connection: Connection) -> dict[str, tuple[str, Any]]:
    """The kept figures: node to (time of receipt, body)."""
    table = models.last_samples
    return {row.node: (row.received_at, row.body) for row in connection.execute(select(table))}


def is_used(connection: Connection, node: str) -> bool:
    """Whether any container belongs to the node, or is on its way there."""
    containers, operations = models.containers, models.operations
    owned = select(containers.c.id).where(containers.c.node == node)
    coming = select(operations.c.id).where(operations.c.node == node, operations.c.ended_at.is_(None))
    return any(connection.execute(query.limit(1)).first() is not None for query in (owned, coming))
