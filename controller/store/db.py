"""The database: one writer thread with group commit, a small pool of readers.

Every write is a function that runs in the writer's thread inside a transaction; what gathered while the last commit
was under way is committed together. SQLite runs in WAL mode with synchronous=FULL, and only the writer's connection
writes and checkpoints (libsqlite before 3.51.3 can corrupt its log otherwise).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from common.errors import Internal, NoSpace, Unavailable, VzfleetError
from controller.records import Change, Record

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_BATCH = 256
MAX_WAITING = 10_000
READERS = 2
PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR)
DISK_FULL = "53100"
"""PostgreSQL's SQLSTATE."""


@dataclass
class Transaction:
    """A transaction in the writer's thread: its connection, and the changes that the rest hears of after the commit."""

    connection: Connection
    changes: list[Change] = field(default_factory=list)

    def changed(self, kind: type[Record], key: str, record: Record | None) -> None:
        """Note a change; called by the noun files of this folder."""
        self.changes.append(Change(kind, key, record))


@dataclass
class _Job:
    work: Callable[[Transaction], Any]
    future: asyncio.Future[Any]
    changes: list[Change] = field(default_factory=list)
    result: Any = None
    error: Exception | None = None


CommitListener = Callable[[Sequence[Change]], None]


class Database:
    """The store's connections. `on_commit` runs on the event loop, in commit order, before the writers are answered."""

    def __init__(self, url: str, on_commit: CommitListener) -> None:
        self._writer_engine = make_engine(url, writer=True)
        self._reader_engine = make_engine(url, writer=False)
        self._on_commit = on_commit
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.commits = 0

    async def open(self) -> None:
        """Start the writer's thread. Raises Unavailable when the database cannot be opened."""
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._write_loop, args=(opened,), name="store-writer", daemon=True)
        self._thread.start()
        await opened

    async def close(self) -> None:
        """Commit what waits, end the thread, close all connections."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._jobs.put(None)
            await asyncio.to_thread(thread.join)
        await asyncio.to_thread(self._readers.shutdown)
        self._reader_engine.dispose()
        self._writer_engine.dispose()

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction and return its result once it is durable.

        What `work` raises reaches the caller and undoes its part only. Raises NoSpace when the disk is full,
        Unavailable when too many writes wait.
        """
        if self._loop is None or self._thread is None:
            raise Unavailable("the store is closed")
        future: asyncio.Future[Any] = self._loop.create_future()
        try:
            self._jobs.put_nowait(_Job(work, future))
        except queue.Full:
            raise Unavailable("too many writes are waiting") from None
        result: T = await asyncio.shield(future)
        return result

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run a query in a reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read_in_thread, work)

    def _read_in_thread(self, work: Callable[[Connection], T]) -> T:
        with self._reader_engine.connect() as connection:
            return work(connection)

    # ------------------------------------------------------------ the writer's thread

    def _write_loop(self, opened: asyncio.Future[None]) -> None:
        try:
            connection = self._writer_engine.connect()
        except SQLAlchemyError as error:
            self._call_loop(opened.set_exception, Unavailable(f"the database cannot be opened: {error}"))
            return
        self._call_loop(opened.set_result, None)
        with connection:
            while (batch := self._next_batch()) is not None:
                self._run_batch(connection, batch)

    def _next_batch(self) -> list[_Job] | None:
        job = self._jobs.get()
        if job is None:
            return None
        batch = [job]
        while len(batch) < MAX_BATCH:
            try:
                following = self._jobs.get_nowait()
            except queue.Empty:
                break
            if following is None:
                self._jobs.put(None)
                break
            batch.append(following)
        return batch

    def _run_batch(self, connection: Connection, batch: list[_Job]) -> None:
        try:
            with connection.begin():
                for job in batch:
                    _run_job(connection, job, alone=len(batch) == 1)
            self.commits += 1
        except Exception as error:  # the commit failed, or the only job did: nobody is told a success
            reason = _translate(error)
            for job in batch:
                job.error = job.error or reason
        self._call_loop(self._settle, batch)

    def _call_loop(self, function: Callable[..., object], *arguments: Any) -> None:
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.warning("a write ended after the event loop")

    def _settle(self, batch: list[_Job]) -> None:
        changes = [change for job in batch if job.error is None for change in job.changes]
        try:
            if changes:
                self._on_commit(changes)
        finally:
            # What is durable is so, whatever its listener makes of it.
            for job in batch:
                _answer(job)


def _run_job(connection: Connection, job: _Job, alone: bool) -> None:
    transaction = Transaction(connection)
    if alone:
        job.result = job.work(transaction)
    else:
        savepoint = connection.begin_nested()
        try:
            job.result = job.work(transaction)
            savepoint.commit()
        except Exception as error:
            job.error = _translate(error)
            if isinstance(error, DBAPIError) and isinstance(job.error, NoSpace | Unavailable):
                raise
            # Fails when the database has rolled back the whole transaction by itself: then the batch fails, too.
            savepoint.rollback()
    job.changes = transaction.changes


def _answer(job: _Job) -> None:
    if job.future.done():
        return
    if job.error is not None:
        job.future.set_exception(job.error)
    else:
        job.future.set_result(job.result)


def _translate(error: Exception) -> Exception:
    if isinstance(error, VzfleetError):
        return error
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None) or 0
    full = code & 0xFF == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", None) == DISK_FULL
    if full or (isinstance(cause, OSError) and cause.errno == errno.ENOSPC):
        return NoSpace("the controller's disk is full")
    if code & 0xFF in PASSING or (isinstance(error, DBAPIError) and error.connection_invalidated):
        log.error("the database cannot be used for now", exc_info=error)
        return Unavailable(f"the database cannot be used for now: {cause}")
    log.error("a write failed", exc_info=error)
    return Internal("the store failed; the controller's log says why")


def make_engine(url: str, writer: bool) -> Engine:
    """An engine for a database URL, with what SQLite needs set on each connection."""
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, poolclass=NullPool if writer else None)

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions on its own
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA busy_timeout=5000")
        if writer:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        else:
            connection.execute("PRAGMA query_only=ON")
            connection.execute("PRAGMA wal_autocheckpoint=0")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return engine
