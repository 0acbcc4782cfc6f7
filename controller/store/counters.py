"""Numbers that only grow: the controller's epoch, the containers' generations."""

from __future__ import annotations

from sqlalchemy import insert, update

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
