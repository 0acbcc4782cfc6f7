"""The number that each commit carries: one row, raised in the same transaction."""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, insert, select

from controller.store.models import counters

COMMITS = "commits"
_FIRST_BITS = 52
_READ = select(counters.c.value).where(counters.c.name == COMMITS)


def number_of_last_commit(connection: Connection) -> int | None:
    """The number of the last commit; None in a database whose commits were never numbered."""
    value: int | None = connection.execute(_READ).scalar()
    return value


def first_number() -> int:
    """Where a database begins to count: at random, so that the log of another database is told by its number."""
    return secrets.randbits(_FIRST_BITS)


def put_number(connection: Connection, number: int) -> None:
    """Give the transaction under way its number. As text, which every commit pays for: a third of the built query."""
    statement = f"UPDATE counters SET value = {number:d} WHERE name = '{COMMITS}'"  # noqa: S608 a number and a constant
    if connection.exec_driver_sql(statement).rowcount == 0:
        connection.execute(insert(counters).values(name=COMMITS, value=number))
