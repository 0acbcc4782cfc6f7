"""Connections to SQLite and PostgreSQL as the store needs them, and their errors in the project's words."""

from __future__ import annotations

import errno
import logging
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from common.errors import Internal, InvalidRequest, NoSpace, Unavailable, VzfleetError

log = logging.getLogger(__name__)
_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_DISK_FULL = "53100"
"""PostgreSQL's SQLSTATE."""
_SERVER_TROUBLE = ("08", "53", "57")
"""Classes of SQLSTATE: connection exception, insufficient resources, operator intervention."""
_LOCK_NOT_AVAILABLE = "55P03"
_LOCK = 0x767A666C656574
"""The advisory lock of the one controller of a PostgreSQL database ("vzfleet")."""
_LOCK_PATIENCE = "3s"
"""How long a connection waits for the lock: the server takes a moment to notice that the former holder is gone."""
_CONNECT_TIMEOUT = 5
_BACKENDS = ("sqlite", "postgresql")


def parse(url: str) -> URL:
    """A database URL, with the driver that is used for it. Raises InvalidRequest."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidRequest("the database URL cannot be read", field="database_url") from None
    backend = parsed.get_backend_name()
    if backend not in _BACKENDS:
        raise InvalidRequest(
            f"there is no store for {backend!r}", field="database_url", allowed="sqlite:///FILE or postgresql://…"
        )
    return parsed.set(drivername="postgresql+psycopg") if backend == "postgresql" else parsed


def make_engine(url: str, writer: bool) -> Engine:
    """An engine for a database URL. A database has one connection with `writer` at a time.

    PostgreSQL holds it to that: a second one raises Unavailable when it connects. SQLite does not; the lock of the
    state directory does.
    """
    parsed = parse(url)
    if parsed.get_backend_name() == "postgresql":
        return _postgresql(parsed, writer)
    engine = create_engine(parsed if writer else _read_only(parsed), poolclass=NullPool if writer else None)

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


def _read_only(url: URL) -> URL:
    """The same SQLite file, opened so that the connection can neither write nor checkpoint, not even at its end."""
    path = quote(str(Path(url.database or "").absolute()))
    return url.set(database=f"file:{path}", query={"mode": "ro", "uri": "true"})


def _postgresql(url: URL, writer: bool) -> Engine:
    try:
        engine = create_engine(
            url,
            poolclass=NullPool if writer else None,
            pool_pre_ping=not writer,
            connect_args={"connect_timeout": _CONNECT_TIMEOUT},
        )
    except ModuleNotFoundError:
        raise InvalidRequest(
            "PostgreSQL needs psycopg: pip install 'vzfleet[controller,postgresql]'", field="database_url"
        ) from None
    if writer:
        event.listen(engine, "connect", _take_lock)
    return engine


def _take_lock(connection: Any, _record: object) -> None:
    """Let in one controller; the server lets go of the lock when the connection ends."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = '{_LOCK_PATIENCE}'")
            cursor.execute(f"SELECT pg_advisory_lock({_LOCK})")
            cursor.execute("SET lock_timeout = 0")
        connection.commit()
    except Exception as error:
        connection.close()
        if getattr(error, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
            raise Unavailable("another controller works on this database: stop it first") from None
        raise


def checkpoint(connection: Connection) -> None:
    """Have the writer take SQLite's log into the file of the database, as far as readers let it, between commits."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, sqlite3.Connection):
        return
    try:
        driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error as error:
        log.warning("the log was not taken into the database", extra={"reason": str(error)})


def is_disconnect(error: Exception) -> bool:
    """Whether the connection to the server was lost, so that nobody knows what became of a commit under way."""
    return isinstance(error, DBAPIError) and bool(error.connection_invalidated)


def is_damage(error: Exception) -> bool:
    """Whether SQLite says that the file is damaged, or no database."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return (getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF in _DAMAGED


def translate(error: Exception) -> Exception:
    """An error of the database as one of the project; a full disk is NoSpace, what may pass is Unavailable."""
    if isinstance(error, VzfleetError):
        return error
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None) or 0
    full = code & 0xFF == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", None) == _DISK_FULL
    if full or (isinstance(cause, OSError) and cause.errno == errno.ENOSPC):
        return NoSpace("the controller's disk is full")
    if is_damage(error):
        log.critical("the database is damaged", exc_info=error)
        return Unavailable("the database is damaged: restore a backup")
    if code & 0xFF in _PASSING or is_disconnect(error) or _is_server_trouble(error):
        log.error("the database cannot be used for now", extra={"reason": str(cause)})
        return Unavailable(f"the database cannot be used for now: {cause}")
    if isinstance(error, DataError):
        return InvalidRequest(f"the database cannot keep this: {cause}")
    log.error("a statement failed", exc_info=error)
    return Internal("the store failed; the controller's log says why")


def _is_server_trouble(error: Exception) -> bool:
    """Whether PostgreSQL cannot be reached, is starting or stopping, or has no connection left."""
    if not isinstance(error, OperationalError) or getattr(error.orig, "sqlite_errorcode", None) is not None:
        return False
    state = getattr(error.orig, "sqlstate", None)
    return state is None or state[:2] in _SERVER_TROUBLE
