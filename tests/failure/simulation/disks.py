"""Disks that survive a crash: what was committed stays, what waited for its commit is lost. No threads, no files."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import StaticPool

from agent import journal as journal_module
from agent.journal import Journal
from common.clock import Clock
from common.errors import Unavailable
from controller.store.db import CommitListener, Database, Transaction, _Job
from controller.store.mark import Mark, Marked
from controller.store.models import metadata
from tests.failure.simulation.loop import Process

T = TypeVar("T")
COMMIT = (0.0002, 0.003)
"""Seconds that a commit takes."""


class Disk:
    """One machine's disk: whether it is full, and how long a commit takes."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.full = False
        self._chance = random.Random(f"{seed}/disk/{name}")

    def commit_time(self) -> float:
        """Seconds for the next commit; now and then much longer than others."""
        return self._chance.uniform(*COMMIT) if self._chance.random() > 0.01 else self._chance.uniform(0.1, 1.5)


def full_error() -> sqlite3.OperationalError:
    """What SQLite raises when there is no room."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


# ---------------------------------------------------------------- the controller's store


class SimulatedMark:
    """The side file that remembers the last commit; has the methods of `controller.store.mark.Mark`."""

    def __init__(self) -> None:
        self.marked: Marked | None = None

    def read(self) -> Marked | None:
        return self.marked

    def open(self, commits: int) -> None:
        self.marked = Marked(commits, clean=False)

    def advance(self, commits: int) -> None:
        self.marked = Marked(commits, clean=False)

    def close(self) -> None:
        """It is never closed in order."""


class StoreDisk(Disk):
    """The controller's disk with its database, which is kept in memory and is the same for all its lives."""

    def __init__(self, seed: int) -> None:
        super().__init__("controller", seed)
        self.connection = _ENGINE.connection()
        self.mark = SimulatedMark()
        _ENGINE.disk = self
        for table in reversed(metadata.sorted_tables):
            self.connection.execute(table.delete())
        self.connection.commit()


class _MemoryEngine:
    """One database in memory for the whole process: SQLAlchemy compiles each statement once."""

    def __init__(self) -> None:
        self.disk: StoreDisk | None = None
        self._connection: Connection | None = None

    def connection(self) -> Connection:
        """The only connection."""
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def _open(self) -> Connection:
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})

        @event.listens_for(engine, "connect")
        def _prepare(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA foreign_keys=ON")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        @event.listens_for(engine, "commit")
        def _commit(connection: Connection) -> None:
            if self.disk is not None and self.disk.full:
                # SQLite rolls back by itself when it cannot write at a COMMIT.
                connection.connection.rollback()
                raise OperationalError("COMMIT", {}, full_error())

        metadata.create_all(engine)
        return engine.connect()


_ENGINE = _MemoryEngine()


class SimulatedDatabase(Database):
    """The store of one life of the controller: the real batches and rules, at virtual times and without a thread."""

    def __init__(self, disk: StoreDisk, process: Process, on_commit: CommitListener, *more: Any, **named: Any) -> None:
        super().__init__("sqlite://", on_commit, cast(Mark, disk.mark), *more, **named)
        self._disk = disk
        self._process = process
        self._waiting: list[_Job] = []
        self.durable: Callable[[], None] = lambda: None
        """Called between a commit and the moment when anybody hears of it."""

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            self._prepare(self._disk.connection)
        except OperationalError as error:
            raise Unavailable(f"the database cannot be opened: {error}") from None

    async def close(self) -> None:
        self._loop = None

    async def write(self, work: Callable[[Transaction], T]) -> T:
        self._process.check()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append(_Job(work, future))
        if len(self._waiting) == 1:
            loop.call_later(self._disk.commit_time(), self._commit_waiting)
        result: T = await asyncio.shield(future)
        return result

    async def read(self, work: Callable[[Connection], T]) -> T:
        self._process.check()
        await asyncio.sleep(0)
        connection = self._disk.connection
        try:
            return work(connection)
        finally:
            connection.rollback()

    def _commit_waiting(self) -> None:
        batch, self._waiting = self._waiting, []
        if not self._process.dead:
            self._run_batch(self._disk.connection, batch)
            self.durable()

    def _settle(self, batch: list[_Job], *told: Any) -> None:
        if not self._process.dead:
            super()._settle(batch, *told)


# ---------------------------------------------------------------- an agent's journal


class JournalDisk(Disk):
    """A host's disk with its agent's journal."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, seed)
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.database.executescript(journal_module._SCHEMA)

    def rows(self) -> list[tuple[str, bytes | None, bool]]:
        """The commands that stand in the journal: id, result, whether it is acknowledged."""
        found = self.database.execute("SELECT id, result, acknowledged FROM commands ORDER BY number")
        return [(id, result, bool(acknowledged)) for id, result, acknowledged in found]


class SimulatedJournal(Journal):
    """The journal of one life of an agent: the real jobs and rules, at virtual times and without a thread."""

    def __init__(self, disk: JournalDisk, process: Process, clock: Clock) -> None:
        super().__init__(Path("journal.db"), clock)
        self._disk = disk
        self._process = process
        self._waiting: list[Any] = []

    async def open(self) -> None:
        await self._run(self._load)

    async def close(self) -> None:
        pass

    async def _run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        self._process.check()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._waiting.append((self._with_room(job), loop, done))
        if len(self._waiting) == 1:
            loop.call_later(self._disk.commit_time(), self._commit_waiting)
        return await done

    def _with_room(self, job: Callable[[sqlite3.Connection], T]) -> Callable[[sqlite3.Connection], T]:
        def work(database: sqlite3.Connection) -> T:
            before = database.total_changes
            result = job(database)
            if self._disk.full and database.total_changes != before:
                raise full_error()
            return result

        return work

    def _commit_waiting(self) -> None:
        batch, self._waiting = self._waiting, []
        if not self._process.dead:
            self._commit(self._disk.database, batch)
