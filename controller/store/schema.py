"""The schema's revision: made on the first run, moved forward by `upgrade-db`, refused when it is another one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from common.errors import Conflict
from controller.store.engines import make_engine
from controller.store.health import database_file, not_opened

_MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to this version's schema, or to an earlier `revision` when it is empty.

    An SQLite file is copied beside itself before. Not while a controller works on it, unless nothing is to be done.
    """
    current, wanted = revisions(url)
    if current == wanted:
        return
    if current is not None:
        check_known(current)
        _copy_before_upgrade(url, current)
    engine = make_engine(url, writer=True)
    if engine.dialect.name == "sqlite":
        # A table that is rebuilt is dropped, which would delete the rows of others that refer to it.
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=OFF"))
    configuration = Config()
    configuration.set_main_option("script_location", str(_MIGRATIONS))
    try:
        with engine.begin() as connection:
            configuration.attributes["connection"] = connection
            command.upgrade(configuration, revision)
    finally:
        engine.dispose()


def check(url: str) -> None:
    """Raise Conflict when the database is not at this version's schema, Unavailable when it cannot be opened."""
    current, wanted = revisions(url)
    if current is None:
        raise Conflict("the database is empty: run 'python -m controller init' first")
    if current != wanted:
        check_known(current)
        raise Conflict(
            f"the database is at schema {current}, this version needs {wanted}: run 'python -m controller upgrade-db'"
        )


def revisions(url: str) -> tuple[str | None, str | None]:
    """The schema of the database (None when it is empty) and that of this version. Raises Unavailable."""
    wanted = ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    file = database_file(url)
    if file is not None and not file.exists() and file.parent.is_dir():
        return None, wanted
    engine = make_engine(url, writer=False)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision(), wanted
    except DBAPIError as error:
        raise not_opened(file, error) from None
    finally:
        engine.dispose()


def check_known(current: str) -> None:
    """Raise Conflict for a schema of another, newer version."""
    scripts = ScriptDirectory(str(_MIGRATIONS))
    known = {script.revision for script in scripts.walk_revisions()}
    if current not in known:
        raise Conflict(
            f"the database is at schema {current}, of which this version (schema {scripts.get_current_head()}) knows "
            "nothing: run the version of vzfleet that wrote it, or a newer one"
        )


def _copy_before_upgrade(url: str, revision: str) -> None:
    file = database_file(url)
    if file is None:
        return
    source, target = sqlite3.connect(file), sqlite3.connect(f"{file}.before-{revision}")
    try:
        source.backup(target)
    finally:
        source.close()
        target.close()
