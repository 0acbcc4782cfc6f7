"""The database: one writer thread with group commit, a small pool of readers.

Every write is a function that runs in the writer's thread inside a transaction; what gathered while the last commit
was under way is committed together. SQLite runs in WAL mode with synchronous=FULL, and only the writer's connection
writes and checkpoints (libsqlite before 3.51.3 can corrupt its log otherwise). With a mark every commit is numbered,
so that one which was lost is noticed at the next start (`controller/store/mark.py`, `health.py`).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from common.errors import NoSpace, Unavailable, VzfleetError
from controller.records import Change, Event, Node, Record
from controller.store.engines import checkpoint, is_disconnect, make_engine, translate
from controller.store.mark import Mark
from controller.store.numbering import first_number, number_of_last_commit, put_number

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_BATCH = 256
MAX_WAITING = 10_000
READERS = 2
ASK_AGAIN = 0.5
"""Seconds between two tries to learn what became of a commit when the server went away."""


@dataclass
class Transaction:
    """A transaction in the writer's thread: its connection, and the changes that the rest hears of after the commit."""

    connection: Connection
    changes: list[Change] = field(default_factory=list)

    def changed(
        self, kind: type[Record], key: str, record: Record | None, new: bool = False, before: Record | None = None
    ) -> None:
        """Note a change; called by the noun files of this folder. An `Event` without a number is one to be told."""
        self.changes.append(Change(kind, key, record, new, before))


@dataclass
class _Job:
    work: Callable[[Transaction], Any]
    future: asyncio.Future[Any]
    changes: list[Change] = field(default_factory=list)
    drafts: list[Event] = field(default_factory=list)
    result: Any = None
    error: Exception | None = None


class Chronicle(Protocol):
    """Writes the events of what is committed, with it (`controller.store.events`); called in the writer's thread."""

    def open(self, connection: Connection) -> None: ...

    def derive(self, changes: Sequence[Change]) -> list[Event]: ...

    def write(self, connection: Connection, drafts: Sequence[Event]) -> list[Event]: ...

    def committed(self, events: Sequence[Event]) -> None: ...


CommitListener = Callable[[Sequence[Change]], None]


class Database:
    """The store's connections. `on_commit` runs on the event loop, in commit order, before the writers are answered.

    With a chronicle it hears of the events, too, after the records that they tell of.
    """

    def __init__(
        self, url: str, on_commit: CommitListener, mark: Mark | None = None, chronicle: Chronicle | None = None
    ) -> None:
        self._writer_engine = make_engine(url, writer=True)
        self._reader_engine = make_engine(url, writer=False)
        self._on_commit = on_commit
        self._mark = mark
        self._chronicle = chronicle
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = threading.Event()
        self._in_doubt = False
        self.commits = 0
        self.number = 0
        """The number of the last commit, if the store has a mark."""

    async def open(self) -> None:
        """Start the writer's thread. Raises Unavailable when the database cannot be opened."""
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._write_loop, args=(opened,), name="store-writer", daemon=True)
        self._thread.start()
        await opened

    async def close(self) -> None:
        """Commit what waits, end the thread, close all connections; the writer's is the last."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        await asyncio.to_thread(self._readers.shutdown)
        self._reader_engine.dispose()
        self._closing.set()
        self._jobs.put(None)
        await asyncio.to_thread(thread.join)
        self._writer_engine.dispose()

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction and return its result once it is durable.

        What `work` raises reaches the caller and undoes its part only. Raises NoSpace when the disk is full,
        Unavailable when too many writes wait.
        """
        if self._loop is None or self._thread is None:
            raise Unavailable("the store is closed")
        if self._in_doubt:
            raise Unavailable("the database cannot be reached")
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
        try:
            with self._reader_engine.connect() as connection:
                return work(connection)
        except DBAPIError as error:
            raise translate(error) from error

    # ------------------------------------------------------------ the writer's thread

    def _write_loop(self, opened: asyncio.Future[None]) -> None:
        connection = None
        try:
            connection = self._writer_engine.connect()
            self._prepare(connection)
        except (SQLAlchemyError, VzfleetError, OSError) as error:
            if connection is not None:
                connection.close()
            reason = error.text if isinstance(error, VzfleetError) else str(error)
            self._call_loop(opened.set_exception, Unavailable(f"the database cannot be opened: {reason}"))
            return
        self._call_loop(opened.set_result, None)
        with connection:
            while (batch := self._next_batch()) is not None:
                self._run_batch(connection, batch)
        if self._mark is not None:
            self._mark.close()

    def _prepare(self, connection: Connection) -> None:
        """Before the first write: go on with the numbers of commits and of events."""
        self._begin_numbering(connection)
        if self._chronicle is not None:
            with connection.begin():
                self._chronicle.open(connection)

    def _begin_numbering(self, connection: Connection) -> None:
        """Go on after the highest number that was ever given, whether its commit is still there or not."""
        if self._mark is None:
            return
        with connection.begin():
            number, marked = number_of_last_commit(connection), self._mark.read()
            known = [one for one in (number, marked.commits if marked else None) if one is not None]
            self.number = max(known) if known else first_number()
            if number != self.number:
                put_number(connection, self.number)
        self._mark.open(self.number)

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
        number, committing = self.number + 1, False
        told: list[Event] = []
        try:
            with connection.begin():
                for job in batch:
                    _run_job(connection, job, self._chronicle, alone=len(batch) == 1)
                if self._chronicle is not None:
                    drafts = [draft for job in batch if job.error is None for draft in job.drafts]
                    told = self._chronicle.write(connection, drafts)
                if self._mark is not None:
                    put_number(connection, number)
                committing = True
        except Exception as error:  # the commit failed, or the only job did: nobody is told a success
            if not (committing and is_disconnect(error) and self._took_place(connection, number)):
                reason = translate(error)
                for job in batch:
                    job.error = job.error or reason
                self._call_loop(self._settle, batch, ())
                return
        self.commits += 1
        if self._chronicle is not None:
            self._chronicle.committed(told)
        self.number = number
        if self._mark is not None:
            self._mark.advance(number)
        if any(change.kind is Node for job in batch if job.error is None for change in job.changes):
            # A damaged log must not take the keys of nodes with it: they are the ones who know what was lost.
            checkpoint(connection)
        self._call_loop(self._settle, batch, told)

    def _took_place(self, connection: Connection, number: int) -> bool:
        """Whether a commit whose answer was lost with the server took place: asked until the server is back.

        Else rows might stand there of which the memory, and whoever asked, know nothing.
        """
        self._in_doubt = self._mark is not None
        try:
            while self._in_doubt and not self._closing.wait(ASK_AGAIN):
                try:
                    with connection.begin():
                        return number_of_last_commit(connection) == number
                except (SQLAlchemyError, VzfleetError) as error:
                    log.error("a commit is in doubt until the database is back", extra={"reason": str(error)})
            return False
        finally:
            self._in_doubt = False

    def _call_loop(self, function: Callable[..., object], *arguments: Any) -> None:
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.warning("a write ended after the event loop")

    def _settle(self, batch: list[_Job], told: Sequence[Event]) -> None:
        changes = [change for job in batch if job.error is None for change in job.changes]
        changes += [Change(Event, event.source, event, new=True) for event in told]
        try:
            if changes:
                self._on_commit(changes)
        finally:
            # What is durable is so, whatever its listener makes of it.
            for job in batch:
                _answer(job)


def _run_job(connection: Connection, job: _Job, chronicle: Chronicle | None, alone: bool) -> None:
    if alone:
        _work(connection, job, chronicle)
    else:
        savepoint = connection.begin_nested()
        try:
            _work(connection, job, chronicle)
            savepoint.commit()
        except Exception as error:
            job.error = translate(error)
            if isinstance(error, DBAPIError) and isinstance(job.error, NoSpace | Unavailable):
                raise
            # Fails when the database has rolled back the whole transaction by itself: then the batch fails, too.
            savepoint.rollback()


def _work(connection: Connection, job: _Job, chronicle: Chronicle | None) -> None:
    transaction = Transaction(connection)
    job.result = job.work(transaction)
    if chronicle is not None:
        job.drafts = chronicle.derive(transaction.changes)
    job.changes = [change for change in transaction.changes if change.kind is not Event]


def _answer(job: _Job) -> None:
    if job.future.done():
        return
    if job.error is not None:
        job.future.set_exception(job.error)
    else:
        job.future.set_result(job.result)
