"""First answers to writes that came with an Idempotency-Key."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, delete, insert, select

from controller.records import FirstAnswer
from controller.store import models
from controller.store.db import Transaction

_TABLE = models.idempotency_keys


def find(connection: Connection, caller: str, key: str) -> FirstAnswer | None:
    """The first answer that this caller got under this key."""
    row = connection.execute(select(_TABLE).where(_TABLE.c.caller == caller, _TABLE.c.key == key)).first()
    return None if row is None else FirstAnswer(**row._mapping)


def keep(transaction: Transaction, answer: FirstAnswer) -> None:
    """Keep a first answer. Raises sqlalchemy's IntegrityError when there is one already."""
    transaction.connection.execute(insert(_TABLE).values(msgspec.to_builtins(answer)))


def forget(transaction: Transaction, caller: str, key: str) -> None:
    """Forget one, if it is there."""
    transaction.connection.execute(delete(_TABLE).where(_TABLE.c.caller == caller, _TABLE.c.key == key))


def prune(transaction: Transaction, made_before: str, limit: int = 500) -> int:
    """Forget a small batch of answers given before then; returns how many."""
    old = select(_TABLE.c.caller, _TABLE.c.key).where(_TABLE.c.created_at < made_before).limit(limit)
    found = transaction.connection.execute(old).all()
    for caller, key in found:
        forget(transaction, caller, key)
    return len(found)
