"""The number that each commit carries: one row, raised in the same transaction."""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, bindparam, insert, select, update

from controller.store.models import counters

COMMITS = "commits"
_FIRST_BITS = 52
_READ = select(counters.c.value).where(counters.c.name == COMMITS)
_RAISE = update(counters).where(counters.c.name == COMMITS).values(value=bindparam("number"))


def number_of_last_commit(connection: Connection) -> int | None:
    """The number of the last commit; None in a database whose commits were never numbered."""
    value: int | None = connection.execute(_READ).scalar()
    return value


def first_number() -> int:
    """Where a database begins to count: at random, so that the log of another database is told by its number."""
    return secrets.randbits(_FIRST_BITS)


def put_number(connection: Connection, number: int) -> None:
    """Give the transaction under way its number."""
    if connection.execute(_RAISE, {"number": number}).rowcount == 0:
        connection.execute(insert(counters).values(name=COMMITS, value=number))
