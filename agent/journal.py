"""What was begun and done: a repeated command is answered, not redone. SQLite (WAL, synchronous=FULL).

One thread does all of its work; what waits meanwhile is committed together.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from agent.admission import Record, containers_of
from common.clock import Clock
from common.codec import decode_from_agent, encode
from common.commands import target_of
from common.errors import Internal, NoSpace, Unavailable
from common.messages import Command, Result

_T = TypeVar("_T")
KEEP_SECONDS = 7 * 24 * 3600.0
KEEP_IDS = 10_000
FORGET_SECONDS = 30 * 24 * 3600.0
"""After that long a command is forgotten, even when the controller never acknowledged its result."""
GROUP = 256
PRUNE_EVERY = 1000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS commands (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    begun_at REAL NOT NULL,
    result BLOB,
    acknowledged INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS unacknowledged ON commands (number) WHERE acknowledged = 0 AND result IS NOT NULL;
CREATE TABLE IF NOT EXISTS generations (container TEXT PRIMARY KEY, generation INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
_Job = tuple[Callable[[sqlite3.Connection], Any], asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Journal:
    """The journal of one agent. Every method that changes it returns when the change is durable.

    Raises NoSpace when its disk is full; nothing of the call is kept then.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._begun = 0
        self.epoch = 0
        """The highest controller epoch ever seen."""
        self.generations: dict[str, int] = {}
        """The highest generation journalled for each container."""

    async def open(self) -> None:
        """Open or make the file. Raises Unavailable when it is damaged or cannot be opened."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._thread = threading.Thread(
            target=self._work, args=(asyncio.get_running_loop(), opened), name="journal", daemon=True
        )
        self._thread.start()
        await opened
        await self._run(self._load)

    async def close(self) -> None:
        """Finish what waits and close the file."""
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def highest(self) -> tuple[int, int]:
        """The highest epoch ever seen, and the highest generation journalled for any container."""
        return self.epoch, max(self.generations.values(), default=0)

    async def find(self, command: str) -> Record | None:
        """What is known of a command."""

        def look(database: sqlite3.Connection) -> Record | None:
            row = database.execute("SELECT result FROM commands WHERE id = ?", (command,)).fetchone()
            return None if row is None else Record(command, _read(row[0]) if row[0] is not None else None)

        return await self._run(look)

    async def begin(self, command: Command) -> None:
        """Note that a command is about to run, with its epoch and generation. A second time changes nothing."""
        epoch = max(self.epoch, command.epoch)
        target = target_of(command.arguments)
        # A name that a container is given may be of an earlier, younger container: now it counts with this one's.
        given = [name for name in containers_of(command) if name != target]

        def note(database: sqlite3.Connection) -> None:
            database.execute(
                "INSERT INTO commands (id, name, begun_at) VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (command.id, str(command.arguments.__struct_config__.tag), self._clock.now().timestamp()),
            )
            _raise_epoch(database, epoch)
            if target is not None:
                database.execute(
                    "INSERT INTO generations VALUES (?, ?) ON CONFLICT (container) "
                    "DO UPDATE SET generation = max(generation, excluded.generation)",
                    (target, command.generation),
                )
            database.executemany(
                "INSERT OR REPLACE INTO generations VALUES (?, ?)", [(name, command.generation) for name in given]
            )

        await self._run(note)
        self.epoch = max(self.epoch, epoch)
        if target is not None:
            self.generations[target] = max(self.generations.get(target, 0), command.generation)
        self.generations.update(dict.fromkeys(given, command.generation))
        self._begun += 1
        if self._begun % PRUNE_EVERY == 0:
            await self.prune()

    async def finish(self, result: Result) -> None:
        """Keep what a command led to."""
        packed = encode(result)
        await self._run(
            lambda database: database.execute("UPDATE commands SET result = ? WHERE id = ?", (packed, result.command))
        )

    async def acknowledge(self, commands: Iterable[str]) -> None:
        """The controller has these results: they need not be sent again."""
        rows = [(command,) for command in commands]
        await self._run(
            lambda database: database.executemany("UPDATE commands SET acknowledged = 1 WHERE id = ?", rows)
        )

    async def unacknowledged(self) -> list[Result]:
        """The results which the controller has not acknowledged, oldest first."""

        def look(database: sqlite3.Connection) -> list[Result]:
            rows = database.execute(
                "SELECT result FROM commands WHERE acknowledged = 0 AND result IS NOT NULL ORDER BY number"
            )
            return [_read(row[0]) for row in rows]

        return await self._run(look)

    async def see_epoch(self, epoch: int) -> None:
        """Remember the highest epoch; until the agent's end even when it cannot be written."""
        if epoch > self.epoch:
            self.epoch = epoch
            await self._run(lambda database: _raise_epoch(database, epoch))

    async def prune(self) -> None:
        """Forget what is acknowledged, older than KEEP_SECONDS and not among the last KEEP_IDS."""
        now = self._clock.now().timestamp()

        def remove(database: sqlite3.Connection) -> None:
            database.execute(
                "DELETE FROM commands WHERE number <= (SELECT max(number) FROM commands) - ? "
                "AND ((acknowledged = 1 AND begun_at < ?) OR begun_at < ?)",
                (KEEP_IDS, now - KEEP_SECONDS, now - FORGET_SECONDS),
            )

        await self._run(remove)

    def _load(self, database: sqlite3.Connection) -> None:
        row = database.execute("SELECT value FROM facts WHERE name = 'epoch'").fetchone()
        self.epoch = row[0] if row else 0
        self.generations = dict(database.execute("SELECT container, generation FROM generations"))

    async def _run(self, job: Callable[[sqlite3.Connection], _T]) -> _T:
        if self._thread is None:
            raise Unavailable("the journal is closed")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()
        self._jobs.put((job, loop, done))
        return await done

    def _work(self, loop: asyncio.AbstractEventLoop, opened: asyncio.Future[None]) -> None:
        try:
            database = _connect(self._path)
        except sqlite3.Error as error:
            loop.call_soon_threadsafe(_settle, opened, None, _explain(error, self._path))
            return
        loop.call_soon_threadsafe(_settle, opened, None, None)
        while (batch := self._next_batch()) is not None:
            self._commit(database, batch)
        database.close()

    def _next_batch(self) -> list[_Job] | None:
        """What waits, up to GROUP jobs; None when the journal is to be closed."""
        batch: list[_Job] = []
        while len(batch) < GROUP:
            try:
                job = self._jobs.get(block=not batch)
            except queue.Empty:
                break
            if job is None:
                if not batch:
                    return None
                self._jobs.put(None)
                break
            batch.append(job)
        return batch

    def _commit(self, database: sqlite3.Connection, batch: list[_Job]) -> None:
        """Do all jobs in one transaction; when one fails, each in its own, so that it fails alone."""
        results: list[Any] = []
        try:
            database.execute("BEGIN IMMEDIATE")
            results = [job(database) for job, _, _ in batch]
            database.execute("COMMIT")
        # The caller of the job that failed gets the exception, whatever it is.
        except Exception as error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            if len(batch) > 1:
                for one in batch:
                    self._commit(database, [one])
                return
            failure = _explain(error, self._path) if isinstance(error, sqlite3.Error) else error
            _, loop, done = batch[0]
            loop.call_soon_threadsafe(_settle, done, None, failure)
            return
        for (_, loop, done), result in zip(batch, results, strict=True):
            loop.call_soon_threadsafe(_settle, done, result, None)


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        path.chmod(0o600)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        # Kibibytes: single rows are looked up by their key, which needs no more.
        database.execute("PRAGMA cache_size = -256")
        database.executescript(_SCHEMA)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _raise_epoch(database: sqlite3.Connection, epoch: int) -> None:
    database.execute(
        "INSERT INTO facts VALUES ('epoch', ?) ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)",
        (epoch,),
    )


def _read(packed: bytes) -> Result:
    message = decode_from_agent(packed)
    if not isinstance(message, Result):
        raise Internal("the agent's journal holds something that is no result")
    return message


def _explain(error: sqlite3.Error, path: Path) -> Exception:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return NoSpace("the disk of the agent's journal is full: nothing was run")
    return Unavailable(f"the agent's journal {path} cannot be used: {error}")


def _settle(done: asyncio.Future[Any], result: Any, failure: Exception | None) -> None:
    if done.done():
        return
    if failure is not None:
        done.set_exception(failure)
    else:
        done.set_result(result)
