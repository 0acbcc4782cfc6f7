"""Copies of the database: made while the controller runs, and put back while it does not.

SQLite is copied by its online backup through a connection that can neither write nor checkpoint; a copy is one file
without a log. PostgreSQL has tools of its own: pg_dump makes the copy, pg_restore puts it back.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from common.errors import Conflict, InvalidRequest, NoSpace, Unavailable
from controller.store import schema
from controller.store.engines import parse, translate
from controller.store.files import sync_directory
from controller.store.health import database_file

COUNTED = ("nodes", "containers", "snapshots", "images", "operations", "tokens")
PG_DUMP_TIMEOUT = 3600.0


def backup(url: str, target: Path) -> list[str]:
    """Copy the database to a new file of mode 600; returns what is in it, as lines to show.

    Raises Conflict when the file exists, NoSpace, Unavailable.
    """
    if target.exists():
        raise Conflict(f"{target} exists: a backup never replaces a file")
    with _new_file(target) as unfinished:
        file = database_file(url)
        if file is None:
            _dump(url, unfinished)
            found = ["a dump of PostgreSQL's pg_dump in its custom format"]
        else:
            _copy(file, unfinished)
            found = describe(unfinished)
    return found


def restore(url: str, source: Path) -> list[str]:
    """Put a copy in the place of the database, which is kept beside; returns what was done, as lines to show.

    The caller holds the controller's lock. Raises Unavailable for a damaged copy, Conflict for one of a newer version.
    """
    file = database_file(url)
    if file is None:
        raise InvalidRequest(
            "a dump of PostgreSQL is put back by 'pg_restore --clean --if-exists --no-owner --dbname=URL FILE' "
            "while no controller runs; the next start notices that rows are missing"
        )
    if not source.is_file():
        raise InvalidRequest(f"there is no file {source}")
    revision = _check(source)
    done = [f"{source} is whole, at schema {revision}"]
    unfinished = file.with_name(f"{file.name}.restoring")
    unfinished.unlink(missing_ok=True)
    _create(unfinished)
    try:
        _copy(source, unfinished)
        done += describe(unfinished)
        kept = _put_aside(file)
        unfinished.replace(file)
        sync_directory(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)
    if kept is not None:
        done.append(f"the former database is kept as {kept}")
    schema.upgrade(url)
    return done


def describe(file: Path) -> list[str]:
    """What a copy holds."""
    with closing(_open(file)) as connection:
        revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        counts = [
            f"{connection.execute(f'SELECT count(*) FROM {table}').fetchone()[0]} {table}"  # noqa: S608 names of ours
            for table in COUNTED
            if table in tables
        ]
    return [f"schema {revision}, {file.stat().st_size} bytes: {', '.join(counts)}"]


def _check(source: Path) -> str:
    """The schema of a copy, once it is known to be whole."""
    try:
        with closing(_open(source)) as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
            if found != ["ok"]:
                raise Unavailable(f"{source} is damaged: {'; '.join(found)[:300]}")
            revision = str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])
    except (sqlite3.Error, TypeError) as error:
        raise Unavailable(f"{source} is no backup, or a damaged one: {error}") from None
    schema.check_known(revision)
    return revision


def _put_aside(file: Path) -> Path | None:
    """Rename the database with its log; the index of the log is made anew by whoever opens it.

    The log goes first: a database without its log is older, which the next start notices; a log that is left there
    would be applied to the database that takes this one's place.
    """
    kept = file.with_name(f"{file.name}.before-restore-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    if kept.exists():
        raise Conflict(f"{kept} exists: try again in a second")
    log = file.with_name(f"{file.name}-wal")
    if log.exists():
        log.replace(kept.with_name(f"{kept.name}-wal"))
    file.with_name(f"{file.name}-shm").unlink(missing_ok=True)
    if not file.exists():
        return None
    file.replace(kept)
    return kept


def _open(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)


def _copy(source: Path, target: Path) -> None:
    try:
        with closing(_open(source)) as reading, closing(sqlite3.connect(target)) as writing:
            reading.backup(writing)
            # One file: a copy needs no log.
            writing.execute("PRAGMA journal_mode=DELETE")
            writing.commit()
            found = writing.execute("PRAGMA quick_check(3)").fetchall()
        if found != [("ok",)]:
            raise Unavailable(f"{source} is damaged: {found}")
    except sqlite3.Error as error:
        raise translate(error) from None


@contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """A file of mode 600 that takes its name when it is whole. Raises Conflict when the name was taken meanwhile."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    _create(unfinished)
    try:
        yield unfinished
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(unfinished, target)
        except FileExistsError:
            raise Conflict(f"{target} exists: a backup never replaces a file") from None
        sync_directory(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _create(file: Path) -> None:
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))


def _dump(url: str, target: Path) -> None:
    program = shutil.which("pg_dump")
    if program is None:
        raise Unavailable("pg_dump is not installed here: run it where PostgreSQL is, it makes the same backup")
    parsed = parse(url)
    # The password goes by the environment: arguments can be seen by everybody.
    plain = parsed.set(drivername="postgresql", password=None).render_as_string()
    environment = {**os.environ, **({"PGPASSWORD": str(parsed.password)} if parsed.password else {})}
    command = [program, "--format=custom", "--no-owner", f"--file={target}", f"--dbname={plain}"]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PG_DUMP_TIMEOUT
    )
    if done.returncode != 0:
        kind = NoSpace if "No space left" in done.stderr else Unavailable
        raise kind(f"pg_dump failed: {done.stderr.strip()[-500:]}")
