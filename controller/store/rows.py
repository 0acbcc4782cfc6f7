"""Rows of a table to records and back; the noun files say which table and which record."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec
from sqlalchemy import Connection, Table, delete, insert, select, update
from sqlalchemy.engine import Row

from common.errors import NotFound
from controller.records import Record
from controller.store.db import Transaction

R = TypeVar("R", bound=Record)


class Rows(Generic[R]):
    """The records of one table with a single-column key.

    `compared`: what there is to tell of a change depends on what the record was before.
    """

    def __init__(self, table: Table, record: type[R], key: str, compared: bool = False) -> None:
        self._table = table
        self._record = record
        self._key = key
        self._compared = compared

    def decode(self, row: Row[Any]) -> R:
        """A row as a record, its JSON columns typed."""
        values = {name: row._mapping[name] for name in self._record.__struct_fields__}
        return msgspec.convert(values, type=self._record, strict=False)

    def insert(self, transaction: Transaction, record: R) -> R:
        """Add a record. Raises sqlalchemy's IntegrityError when its key is taken."""
        transaction.connection.execute(insert(self._table).values(msgspec.to_builtins(record)))
        transaction.changed(self._record, self._key_of(record), record, new=True)
        return record

    def replace(self, transaction: Transaction, record: R) -> R:
        """Write a record over the one with the same key. Raises NotFound when there is none (any more)."""
        key = self._key_of(record)
        before = self._before(transaction, key)
        values = msgspec.to_builtins(record)
        statement = update(self._table).where(self._table.c[self._key] == key).values(values)
        if transaction.connection.execute(statement).rowcount == 0:
            raise NotFound(f"{self._record.__name__.lower()} {key} is gone")
        transaction.changed(self._record, key, record, before=before)
        return record

    def delete(self, transaction: Transaction, key: str) -> None:
        """Remove a record."""
        before = self._before(transaction, key)
        transaction.connection.execute(delete(self._table).where(self._table.c[self._key] == key))
        transaction.changed(self._record, key, None, before=before)

    def get(self, connection: Connection, key: str) -> R | None:
        """The record with this key."""
        row = connection.execute(select(self._table).where(self._table.c[self._key] == key)).first()
        return None if row is None else self.decode(row)

    def all(self, connection: Connection) -> list[R]:
        """All records, in the order of their keys."""
        rows = connection.execute(select(self._table).order_by(self._table.c[self._key]))
        return [self.decode(row) for row in rows]

    def _before(self, transaction: Transaction, key: str) -> R | None:
        return self.get(transaction.connection, key) if self._compared else None

    def _key_of(self, record: R) -> str:
        key: str = getattr(record, self._key)
        return key
