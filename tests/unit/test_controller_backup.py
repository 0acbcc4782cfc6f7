"""`python -m controller backup | restore | token | init`, and what a damaged or missing database is met with."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from common.clock import SystemClock
from common.errors import Conflict, InvalidRequest, NoSpace, Unavailable
from common.instance import only_one
from controller import settings
from controller.__main__ import main
from controller.records import Token
from controller.services.identities import hash_token, new_token
from controller.spool import Spool
from controller.store import backup, health, schema
from controller.store import tokens as token_rows
from controller.store.engines import parse
from controller.store.mark import Mark
from tests.helpers.cluster import Cluster, cluster


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The directory of a controller that was made and never run."""
    made = tmp_path / "controller"
    assert run("init", made, "--address", "127.0.0.1") == 0
    return made


def run(command: str, state: Path, *arguments: str) -> int:
    return main([command, "--state", str(state), *arguments])


def add_row(state: Path, name: str) -> None:
    database = sqlite3.connect(state / "controller.db")
    database.execute("INSERT INTO tokens VALUES (?, ?, 'viewer', ?, 't', NULL)", (name, name, name))
    database.commit()
    database.close()


def names(file: Path) -> set[str]:
    database = sqlite3.connect(file)
    found = {str(row[0]) for row in database.execute("SELECT name FROM tokens")}
    database.close()
    return found


# ---------------------------------------------------------------- backup


def test_a_backup_is_whole_private_and_said(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_row(state, "one")
    file = tmp_path / "backup"
    with only_one(state / "controller.lock", "a controller"):
        assert run("backup", state, str(file)) == 0
    assert names(file) == {"one"} and file.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "controller"], "nothing else is left"
    said = capsys.readouterr().out
    assert "1 tokens" in said and "link.key" in said and "tls/" in said and "hashes" in said
    for secret in ("link.key", "controller.json"):
        assert (state / secret).read_bytes().strip() not in file.read_bytes()


def test_a_backup_replaces_nothing(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "backup"
    file.write_text("precious")
    assert run("backup", state, str(file)) == 1
    assert "never replaces" in capsys.readouterr().err and file.read_text() == "precious"
    assert run("backup", state, str(tmp_path / "none" / "backup")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "controller"]


def test_a_backup_reads_what_is_only_in_the_log_and_leaves_it_there(state: Path, tmp_path: Path) -> None:
    writer = sqlite3.connect(state / "controller.db", isolation_level=None)
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("INSERT INTO tokens VALUES ('a', 'in the log', 'viewer', 'h', 't', NULL)")
    log = state / "controller.db-wal"
    before = log.read_bytes()
    assert run("backup", state, str(tmp_path / "backup")) == 0
    assert log.read_bytes() == before, "it neither wrote nor checkpointed"
    writer.close()
    assert names(tmp_path / "backup") == {"in the log"}


def test_the_dump_tool_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="pg_dump"):
        backup.backup("postgresql://nobody@127.0.0.1:1/none", tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidRequest, match="pg_restore"):
        backup.restore("postgresql://nobody@127.0.0.1:1/none", tmp_path / "backup")


# ---------------------------------------------------------------- restore


def test_a_restore_puts_back_and_keeps_what_was(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_row(state, "one")
    assert run("backup", state, str(tmp_path / "backup")) == 0
    add_row(state, "two")
    writer = sqlite3.connect(state / "controller.db", isolation_level=None)
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("INSERT INTO tokens VALUES ('a', 'in the log', 'viewer', 'h', 't', NULL)")
    # As a killed process leaves them: with the log.
    kept_log = (state / "controller.db-wal").read_bytes()
    writer.close()
    (state / "controller.db-wal").write_bytes(kept_log)
    assert run("restore", state, str(tmp_path / "backup")) == 0
    assert names(state / "controller.db") == {"one"}
    (kept,) = (path for path in state.glob("controller.db.before-restore-*") if not path.name.endswith("-wal"))
    assert names(kept) == {"one", "two", "in the log"}
    assert str(kept) in capsys.readouterr().out
    assert not (state / "controller.db-wal").exists(), "the log of the former one would be applied to this one"


def test_a_restore_is_refused_while_a_controller_runs(state: Path, tmp_path: Path) -> None:
    assert run("backup", state, str(tmp_path / "backup")) == 0
    with only_one(state / "controller.lock", "a controller"):
        assert run("restore", state, str(tmp_path / "backup")) == 1
    assert not list(state.glob("*before-restore*"))


@pytest.mark.parametrize("damage", ["no database", "a page", "truncated", "missing", "another database"])
def test_what_is_no_whole_backup_is_refused(state: Path, tmp_path: Path, damage: str) -> None:
    add_row(state, "one")
    file = tmp_path / "backup"
    assert run("backup", state, str(file)) == 0
    content = bytearray(file.read_bytes())
    if damage == "no database":
        file.write_bytes(b"a text\n" * 1000)
    elif damage == "a page":
        content[8192:12288] = b"\xff" * 4096
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        file.unlink()
    else:
        file.unlink()
        sqlite3.connect(file).execute("CREATE TABLE t (a)").connection.close()
    assert run("restore", state, str(file)) == 1
    assert names(state / "controller.db") == {"one"} and not list(state.glob("*restor*"))


def test_a_backup_of_an_older_version_is_brought_up_and_of_a_newer_one_refused(state: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    schema.upgrade(f"sqlite:///{older}", "0001")
    assert run("restore", state, str(older)) == 0
    schema.check(f"sqlite:///{state / 'controller.db'}")
    database = sqlite3.connect(older)
    database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.commit()
    database.close()
    with pytest.raises(Conflict, match=r"9999, of which this version \(schema 0\d+\)"):
        backup.restore(f"sqlite:///{state / 'controller.db'}", older)


# ---------------------------------------------------------------- what is gone or damaged


def test_a_database_that_is_gone_is_not_made_anew(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = Mark(state / "store.mark")
    mark.open(5)
    mark.close()
    (state / "controller.db").unlink()
    for command in ("run", "init"):
        assert run(command, state) == 1
        assert "restore a backup" in capsys.readouterr().err
    assert not (state / "controller.db").exists()


@pytest.mark.parametrize("start", [0, 100, 8192])
def test_a_damaged_database_is_refused(state: Path, capsys: pytest.CaptureFixture[str], start: int) -> None:
    file = state / "controller.db"
    content = bytearray(file.read_bytes())
    content[start : start + 600] = b"\xee" * 600
    file.write_bytes(content)
    assert run("run", state) == 1
    assert "restore a backup" in capsys.readouterr().err
    assert file.read_bytes() == bytes(content), "nothing was written over it"


def test_a_full_disk_is_told_from_a_wrong_directory(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{state / 'controller.db'}"
    (state / "controller.db").write_text("no database, and long enough for a header of one" * 10)
    with pytest.raises(Unavailable, match="right state directory"):
        schema.check(url)
    monkeypatch.setattr(health, "ROOM", 2**62)
    with pytest.raises(NoSpace):
        schema.check(url)


# ---------------------------------------------------------------- tokens by the command line


@pytest.fixture
async def fleet(tmp_path: Path) -> object:
    async with cluster(tmp_path, nodes=0) as made:
        yield made


async def test_a_token_of_the_command_line_is_taken_in_at_its_first_use(
    fleet: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("token", fleet.settings.state, "--role", "viewer", "--name", "by hand") == 0
    known = await fleet.app.store.read(token_rows.rows.all)
    assert [token.name for token in known] == ["admin"], "there is no second writer"
    text = capsys.readouterr().out.strip()
    spool = fleet.settings.state / "spool"
    (file,) = spool.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and text not in file.read_text()
    headers = {"Authorization": f"Bearer {text}"}
    await fleet.refused("GET", "/1.0/vz", None, 401, headers={"Authorization": "Bearer vzf_wrong"})
    await fleet.call("GET", "/1.0/vz", headers=headers)
    await fleet.refused("POST", "/1.0/nodes", {"name": "n"}, 403, headers=headers)
    assert list(spool.iterdir()) == []
    await fleet.stop_controller()
    await fleet.start_controller()
    await fleet.call("GET", "/1.0/vz", headers=headers)


async def test_a_token_waits_for_the_start_and_is_taken_in_once(fleet: Cluster) -> None:
    await fleet.stop_controller()
    text, token = new_token("later", "viewer", SystemClock())
    spool = Spool(fleet.settings.state)
    spool.put(token)
    (fleet.settings.state / "spool" / "damaged.token").write_text("{")
    await fleet.start_controller()
    headers = {"Authorization": f"Bearer {text}"}
    await fleet.call("GET", "/1.0/vz", headers=headers)
    # A crash between the commit and the end of the file.
    spool.put(token)
    await fleet.app.identities.take_in()
    await fleet.call("GET", "/1.0/vz", headers=headers)
    assert [file.name for file in (fleet.settings.state / "spool").iterdir()] == ["damaged.token"]


def test_a_spool_holds_hashes(tmp_path: Path) -> None:
    token = Token("id", "name", "admin", hash_token("secret"), "t")
    Spool(tmp_path).put(token)
    ((_, found),) = Spool(tmp_path).waiting().items()
    assert found == token and "secret" not in (tmp_path / "spool" / "id.token").read_text()


# ---------------------------------------------------------------- where the database is


def test_the_environment_names_the_database_and_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://vz:secret@127.0.0.1/vz"
    assert settings.load(tmp_path).url == f"sqlite:///{tmp_path / 'controller.db'}"
    monkeypatch.setenv(settings.DATABASE_URL, url)
    loaded = settings.load(tmp_path, port=1)
    assert loaded.url == url
    settings.save(loaded)
    assert json.loads((tmp_path / "controller.json").read_text()) == {"port": 1}
    monkeypatch.delenv(settings.DATABASE_URL)
    settings.save(loaded)
    assert settings.load(tmp_path).url == url


def test_a_url_is_checked() -> None:
    assert parse("postgresql://u@h/d").drivername == parse("postgresql+psycopg2://u@h/d").drivername
    for wrong in ("mysql://h/d", "no url"):
        with pytest.raises(InvalidRequest):
            parse(wrong)
