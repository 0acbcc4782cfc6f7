"""What is looked at before a database is used: whether it is whole, and whether all of its commits are there.

Nothing here writes to the database or checkpoints it: a damaged write-ahead log is still there to be looked at.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import DBAPIError

from common.errors import NoSpace, Unavailable, VzfleetError
from controller.store.engines import is_damage, make_engine, parse
from controller.store.mark import Mark, Marked
from controller.store.models import counters
from controller.store.numbering import number_of_last_commit

log = logging.getLogger(__name__)
AHEAD_AT_MOST = 1_000_000
"""Commits by which a database may be ahead of its mark: what a power failure can take from a mark, and much more."""
ROOM = 128 * 1024
"""Bytes which opening a database may take, for the index of its log."""
RESTORE = "restore a backup by 'python -m controller restore FILE'"


def database_file(url: str) -> Path | None:
    """The file of an SQLite database; None for PostgreSQL."""
    parsed = parse(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def not_opened(file: Path | None, error: DBAPIError) -> VzfleetError:
    """Why a database cannot be opened. SQLite needs room for that and says "disk I/O error" without."""
    if file is not None and file.parent.is_dir():
        disk = os.statvfs(file.parent)
        if disk.f_bavail * disk.f_frsize < ROOM:
            return NoSpace(f"the disk of {file} is full: the database cannot be opened")
    return Unavailable(f"the database cannot be opened ({error.orig}): is this the right state directory?")


def examine(url: str, mark: Mark) -> str | None:
    """Why commits are missing, or might be; None when all are there. To be asked before the database is opened.

    Raises Unavailable with what to do when the database is gone, damaged, or out of reach.
    """
    marked, file = mark.read(), database_file(url)
    if file is not None and not file.exists():
        if marked is None:
            return None
        raise Unavailable(f"the database {file} is gone: {RESTORE}")
    engine = make_engine(url, writer=False)
    try:
        with engine.connect() as connection:
            return _examine(connection, file, marked)
    except DBAPIError as error:
        if is_damage(error):
            raise _damaged(file, str(error.orig)) from None
        raise not_opened(file, error) from None
    finally:
        engine.dispose()


def _examine(connection: Connection, file: Path | None, marked: Marked | None) -> str | None:
    if file is not None and (marked is None or not marked.clean):
        _check(connection, file, "quick_check")
    if not inspect(connection).has_table(counters.name):
        if marked is None:
            return None
        raise Unavailable(f"the database {file or ''} is empty, and should not be: {RESTORE}")
    number = number_of_last_commit(connection)
    lost = missing_commits(number, marked)
    if lost is None:
        return None
    log.critical("commits are missing", extra={"reason": lost, "database": number, "mark": marked and marked.commits})
    if file is not None:
        _keep_log(file)
        _check(connection, file, "integrity_check")
    return lost


def missing_commits(number: int | None, marked: Marked | None) -> str | None:
    """What the number of the last commit in the database and the mark say together: None when nothing is missing."""
    if marked is None:
        unproven = "the mark of the last commit is missing: whether the database has all commits cannot be known"
        return unproven if number is not None else None
    if number is None or number < marked.commits:
        behind = f"{marked.commits - number} commits" if number is not None else "all commits"
        return f"{behind} are missing: the write-ahead log was damaged, or an older database was put in place"
    if number > marked.commits + AHEAD_AT_MOST:
        return "the database, or its write-ahead log, is of another controller"
    return None


def _check(connection: Connection, file: Path, pragma: str) -> None:
    found = [str(row[0]) for row in connection.exec_driver_sql(f"PRAGMA {pragma}(3)")]
    if found != ["ok"]:
        raise _damaged(file, "; ".join(found))


def _damaged(file: Path | None, what: str) -> Unavailable:
    log.critical("the database is damaged", extra={"file": str(file), "reason": what})
    return Unavailable(f"the database {file} is damaged ({what[:300]}): {RESTORE}; the damaged one is kept beside it")


def _keep_log(file: Path) -> None:
    """Keep a copy of a write-ahead log from which commits are missing: the next commit writes over it."""
    wal = file.with_name(f"{file.name}-wal")
    try:
        if wal.exists() and wal.stat().st_size:
            copy = wal.with_name(f"{wal.name}.damaged")
            shutil.copyfile(wal, copy)
            copy.chmod(0o600)
            log.warning("the write-ahead log is kept", extra={"file": str(copy)})
    except OSError as error:
        log.warning("the write-ahead log is not kept", extra={"reason": str(error)})
