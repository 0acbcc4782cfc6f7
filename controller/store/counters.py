"""Numbers that only grow: the controller's epoch, the containers' generations."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from controller.store import models
from controller.store.db import Transaction


def advance(transaction: Transaction, name: str) -> int:
    """Add one to the counter and return it; the first value is 1."""
    counters = models.counters
    statement = (
        update(counters).where(counters.c.name == name).values(value=counters.c.value + 1).returning(counters.c.value)
    )
    value = transaction.connection.execute(statement).scalar()
    if value is None:
        transaction.connection.execute(insert(counters).values(name=name, value=1))
        return 1
    return int(value)


def value(connection: Connection, name: str) -> int:
    """What the counter stands at; 0 when it was never used."""
    counters = models.counters
    found = connection.execute(select(counters.c.value).where(counters.c.name == name)).scalar()
    return int(found or 0)


def raise_to(transaction: Transaction, name: str, least: int) -> int:
    """Raise the counter to `least` if it is below; returns what it stands at."""
    counters = models.counters
    present = value(transaction.connection, name)
    if present >= least:
        return present
    raised = update(counters).where(counters.c.name == name).values(value=least)
    if transaction.connection.execute(raised).rowcount == 0:
        transaction.connection.execute(insert(counters).values(name=name, value=least))
    return least
