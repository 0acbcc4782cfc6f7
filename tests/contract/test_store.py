"""The store on SQLite and on PostgreSQL: the same promises of both. The tests start a server of their own."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from msgspec.structs import replace
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import make_url

from common.errors import Busy, Conflict, Internal, NoSpace, NotFound, Unavailable
from common.states import Status
from controller.records import (
    Change,
    Container,
    JoinToken,
    Node,
    NodeMode,
    Operation,
    OperationError,
    Phase,
    Requestor,
    Snapshot,
    Token,
)
from controller.store import containers, counters, images, nodes, operations, schema, tokens
from controller.store.db import Database, Transaction
from controller.store.engines import make_engine, parse
from controller.store.mark import Mark
from controller.store.models import metadata
from controller.store.rows import Rows
from tests.helpers.core import BUILT, FACTS
from tests.helpers.postgresql import Server, server

pytestmark = pytest.mark.xdist_group("postgresql")
THEN = "2026-01-01T00:00:00.000000Z"
NODE = Node("n1", "k" * 40, THEN, FACTS, "a host")
ROW = Container(
    id="101",
    node="n1",
    generation=1,
    hostname="web",
    description="null",
    config={"user.x": "null", "limits.memory": "1GB"},
    image={"fingerprint": "f", "properties": {"os": "busybox"}},
    hwaddr="00:16:3e:00:00:01",
    created_at=THEN,
    phase=Phase.READY,
    operation=None,
    error="null",
    reserved_memory=2**62,
    reserved_disk=1,
)
OPERATION = Operation(
    id="op1",
    kind="container.start",
    status=Status.RUNNING,
    created_at=THEN,
    updated_at=THEN,
    deadline_at=THEN,
    containers=("101", "102"),
    node="n1",
    requestor=Requestor("admin", "tls", "::1"),
    request="r",
    parameters={"a": [1, None, "x"]},
    resources={"containers": ["/1.0/vz/101"]},
    outputs={"image": {"fingerprint": "f"}},
    error=OperationError("conflict", "it is so", 2),
)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Server]:
    with server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    running: Server = request.getfixturevalue("postgresql")
    with running.database() as made:
        yield made


class Store(Database):
    """A database that keeps what its listener heard."""

    def __init__(self, url: str, mark: Mark | None = None) -> None:
        self.heard: list[Change] = []
        self.sqlite = url.startswith("sqlite")
        super().__init__(url, self._hear, mark)

    def _hear(self, changes: Sequence[Change]) -> None:
        self.heard.extend(changes)

    async def write_together(self, *works: Callable[[Transaction], Any]) -> list[Any]:
        """Have the writer find all of these at once; each one's result or exception."""
        busy, free = threading.Event(), threading.Event()

        def block(_transaction: Transaction) -> None:
            busy.set()
            free.wait(10)

        blocked = asyncio.ensure_future(self.write(block))
        await asyncio.to_thread(busy.wait, 10)
        writes = [asyncio.ensure_future(self.write(work)) for work in works]
        await asyncio.sleep(0)
        free.set()
        await blocked
        return await asyncio.gather(*writes, return_exceptions=True)


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    await asyncio.to_thread(schema.upgrade, url)
    store = Store(url)
    await store.open()
    await store.write(lambda transaction: nodes.rows.insert(transaction, NODE))
    yield store
    await store.close()


def add(row: Container) -> Callable[[Transaction], Container]:
    return lambda transaction: containers.rows.insert(transaction, row)


def numbered(number: int) -> Container:
    return replace(ROW, id=str(number), hwaddr=str(number))


async def ids(store: Store) -> set[str]:
    return {row.id for row in await store.read(containers.rows.all)}


# ---------------------------------------------------------------- the writer


async def test_a_failing_job_does_not_take_the_others_with_it(store: Store) -> None:
    def refused(transaction: Transaction) -> None:
        add(numbered(7))(transaction)
        raise Conflict("no")

    before = store.commits
    jobs = [add(numbered(1)), refused, add(numbered(1)), lambda _: 1 / 0, add(numbered(2))]
    results = await store.write_together(*jobs)
    assert store.commits == before + 2, "one for the job that blocked, one for all the others"
    assert [type(result) for result in results] == [Container, Conflict, Internal, Internal, Container]
    assert await ids(store) == {"1", "2"}
    assert [change.key for change in store.heard if change.kind is Container] == ["1", "2"]


async def test_a_job_alone_is_undone_wholly_when_it_fails(store: Store) -> None:
    def half(transaction: Transaction) -> None:
        add(numbered(1))(transaction)
        raise Busy("no")

    with pytest.raises(Busy):
        await store.write(half)
    assert await ids(store) == set() and await store.write(lambda _: 5) == 5


async def test_changes_are_heard_in_the_order_of_commits_and_before_the_answer(store: Store) -> None:
    heard_at_answer: list[int] = []

    async def one() -> None:
        number = await store.write(count)
        heard_at_answer.append(number)
        assert str(number) in {change.key for change in store.heard}

    def count(transaction: Transaction) -> int:
        number = counters.advance(transaction, "test")
        transaction.changed(Token, str(number), None)
        return number

    await asyncio.gather(*(one() for _ in range(300)))
    heard = [int(change.key) for change in store.heard if change.kind is Token]
    assert heard == sorted(heard_at_answer) == list(range(1, 301))


async def test_a_listener_that_fails_keeps_nobody_waiting(store: Store) -> None:
    faults: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
    store._hear = store._on_commit = lambda changes: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    async with asyncio.timeout(10):
        await store.write(add(ROW))
    assert [type(fault) for fault in faults] == [ZeroDivisionError] and await ids(store) == {"101"}


async def test_a_caller_that_goes_away_does_not_undo_its_write(store: Store) -> None:
    going = asyncio.ensure_future(store.write(add(ROW)))
    await asyncio.sleep(0)
    going.cancel()
    await store.write(lambda _: None)
    assert await ids(store) == {"101"}


async def test_closing_commits_what_waits_and_refuses_what_comes(store: Store, url: str) -> None:
    writes = [asyncio.ensure_future(store.write(add(numbered(number)))) for number in range(20)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*writes)
    with pytest.raises(Unavailable):
        await store.write(lambda _: None)
    again = Store(url)
    await again.open()
    assert len(await ids(again)) == 20
    await again.close()


async def test_readers_see_what_is_committed_and_nothing_else(store: Store) -> None:
    inside, free = threading.Event(), threading.Event()

    def slow(transaction: Transaction) -> None:
        add(ROW)(transaction)
        inside.set()
        free.wait(10)

    writing = asyncio.ensure_future(store.write(slow))
    await asyncio.to_thread(inside.wait, 10)
    assert await ids(store) == set()
    free.set()
    await writing
    assert await ids(store) == {"101"}


async def test_a_full_disk_is_no_space_for_all_and_passes(store: Store) -> None:
    if not store.sqlite:
        pytest.skip("how full a disk is can be set for SQLite only")

    def limit(pages: int) -> Callable[[Transaction], Any]:
        return lambda transaction: transaction.connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").scalar()

    def big(number: int) -> Callable[[Transaction], Container]:
        return add(replace(numbered(number), description="x" * 2**20))

    await store.write(limit(100))
    with pytest.raises(NoSpace):
        await store.write(big(1))
    results = await store.write_together(add(numbered(2)), big(3), add(numbered(4)))
    assert [type(result) for result in results] == [NoSpace] * 3, "nobody is told a success that was rolled back"
    assert await ids(store) == set()
    await store.write(limit(10**6))
    await store.write(big(1))
    assert await ids(store) == {"1"}


async def test_a_locked_database_is_unavailable_for_now(store: Store, url: str) -> None:
    if not store.sqlite:
        pytest.skip("only SQLite locks the whole database")
    await store.write(lambda transaction: transaction.connection.exec_driver_sql("PRAGMA busy_timeout=10").scalar())
    other = sqlite3.connect(str(make_url(url).database), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        await store.write(add(ROW))
    other.execute("ROLLBACK")
    other.close()
    await store.write(add(ROW))


async def test_a_lost_connection_is_unavailable_for_now(store: Store, url: str) -> None:
    if store.sqlite:
        pytest.skip("SQLite has no connections to lose")
    other = create_engine(parse(url), isolation_level="AUTOCOMMIT")
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
    with other.connect() as connection:
        connection.execute(text(others + "pg_backend_pid()"))
    other.dispose()
    with pytest.raises(Unavailable):
        await store.write(add(ROW))
    await store.write(add(ROW))
    assert await ids(store) == {"101"}


async def test_a_database_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'missing' / 'store.db'}")
    with pytest.raises(Unavailable):
        await store.open()
    await store.close()


# ---------------------------------------------------------------- the rows


@pytest.mark.parametrize(
    ("rows", "record"),
    [
        (containers.rows, ROW),
        (containers.rows, replace(ROW, image=None, error=None, operation="op1", config={}, phase=Phase.CREATING)),
        (operations.rows, OPERATION),
        (images.rows, BUILT),
        (tokens.rows, Token("t", "admin", "admin", "h" * 64, THEN)),
        (nodes.join_tokens, JoinToken("h" * 64, None, THEN)),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_record_comes_back_as_it_went_in(store: Store, rows: Rows[Any], record: Any) -> None:
    await store.write(lambda transaction: rows.insert(transaction, record))
    assert await store.read(rows.all) == [record]
    assert await store.read(lambda connection: rows.get(connection, "nothing")) is None
    key = store.heard[-1].key
    await store.write(lambda transaction: rows.delete(transaction, key))
    assert await store.read(rows.all) == [] and store.heard[-1].record is None


async def test_replacing_what_is_gone_makes_no_ghost(store: Store) -> None:
    heard = len(store.heard)
    with pytest.raises(NotFound, match="node n9 is gone"):
        await store.write(lambda transaction: nodes.rows.replace(transaction, replace(NODE, name="n9")))
    assert len(store.heard) == heard


async def test_a_container_is_whole_idle_or_neither(store: Store) -> None:
    await store.write(add(replace(ROW, operation="op1")))
    await store.write(add(replace(numbered(2), phase=Phase.FAILED, error="why")))
    with pytest.raises(Busy) as busy:
        await store.write(lambda transaction: containers.require_idle(transaction, "101"))
    assert busy.value.details == {"operation": "/1.0/operations/op1"}
    with pytest.raises(Conflict, match="why"):
        await store.write(lambda transaction: containers.require_ready(transaction, "2"))
    with pytest.raises(NotFound):
        await store.write(lambda transaction: containers.require_ready(transaction, "9"))
    await store.write(lambda transaction: containers.release(transaction, replace(OPERATION, id="op2")))
    assert (await row(store, "101")).operation == "op1", "another operation does not free it"
    await store.write(lambda transaction: containers.release(transaction, OPERATION))
    assert (await row(store, "101")).operation is None
    assert await store.read(lambda connection: containers.has_address(connection, ROW.hwaddr))
    assert not await store.read(lambda connection: containers.has_address(connection, "other"))


async def row(store: Store, id: str) -> Container:
    found = await store.read(lambda connection: containers.rows.get(connection, id))
    assert found is not None
    return found


async def test_snapshots_follow_their_container(store: Store) -> None:
    snapshot = Snapshot("101", "s0", THEN, {"user.x": "1"})
    await store.write(add(ROW))
    await store.write(lambda transaction: containers.add_snapshot(transaction, snapshot))
    await store.write(lambda transaction: containers.change_id(transaction, "101", replace(ROW, id="102")))
    assert await store.read(containers.all_snapshots) == [replace(snapshot, container="102")]
    assert [change.key for change in store.heard[-3:]] == ["101", "102", "102/s0"]
    await store.write(lambda transaction: containers.rows.delete(transaction, "102"))
    assert await store.read(containers.all_snapshots) == []


async def test_what_is_reserved(store: Store) -> None:
    await store.write(lambda transaction: nodes.rows.insert(transaction, Node("n2", "2" * 40, THEN)))
    await store.write(add(replace(numbered(1), reserved_memory=3, reserved_disk=5)))
    await store.write(add(replace(numbered(2), reserved_memory=4, reserved_disk=0, operation="op1")))
    assert await store.write(containers.reserved_by_node) == {"n1": containers.Reserved(7, 5, 2)}
    move = replace(OPERATION, kind="container.move", node="n2", parameters={"reserved": [9, 8]}, containers=("2",))
    await store.write(lambda transaction: operations.add(transaction, move))
    both = {"n1": containers.Reserved(7, 5, 2), "n2": containers.Reserved(9, 8, 1)}
    assert await store.write(containers.reserved_by_node) == both
    used = [await store.read(lambda connection, node=node: nodes.is_used(connection, node)) for node in ("n1", "n2")]
    assert used == [True, True]
    ended = replace(move, status=Status.FAILURE, ended_at=THEN)
    await store.write(lambda transaction: operations.rows.replace(transaction, ended))
    assert await store.write(containers.reserved_by_node) == {"n1": containers.Reserved(7, 5, 2)}
    assert not await store.read(lambda connection: nodes.is_used(connection, "n2"))


async def test_operations_are_found_paged_and_pruned(store: Store) -> None:
    for number in range(6):
        final = number % 2 == 0
        operation = replace(
            OPERATION,
            id=f"op{number}",
            containers=("101",) if number < 3 else (),
            node="n1" if number < 4 else None,
            status=Status.SUCCESS if final else Status.RUNNING,
            ended_at=f"2026-01-0{number + 1}" if final else None,
        )
        await store.write(lambda transaction, operation=operation: operations.add(transaction, operation))

    async def find(**which: Any) -> list[str]:
        found = await store.read(lambda connection: operations.find(connection, **which))
        return [operation.id for operation in found]

    assert await find() == ["op5", "op4", "op3", "op2", "op1", "op0"]
    assert await find(container="101") == ["op2", "op1", "op0"] and await find(container="9") == []
    assert await find(node="n1", status=Status.RUNNING) == ["op3", "op1"]
    assert await find(limit=2, before="op4") == ["op3", "op2"]
    assert [operation.id for operation in await store.read(operations.unfinished)] == ["op1", "op3", "op5"]
    assert await store.read(lambda connection: operations.claiming(connection, "101")) == "op1"
    assert await store.write(lambda transaction: operations.prune(transaction, "2026-01-04")) == 2
    assert await find() == ["op5", "op4", "op3", "op1"] and await find(container="101") == ["op1"]


async def test_a_cancel_is_remembered_unless_it_came_too_late(store: Store) -> None:
    for id, status in (("op1", Status.RUNNING), ("op2", Status.SUCCESS)):
        operation = replace(OPERATION, id=id, status=status)
        await store.write(lambda transaction, operation=operation: operations.add(transaction, operation))
        await store.write(lambda transaction, id=id: operations.mark_cancelling(transaction, id))
    assert [found.status for found in await store.read(operations.rows.all)] == [Status.CANCELLING, Status.SUCCESS]


async def test_nodes_and_what_belongs_to_them(store: Store) -> None:
    assert await store.read(lambda connection: nodes.by_key(connection, NODE.public_key)) == NODE
    assert await store.read(lambda connection: nodes.by_key(connection, "other")) is None
    for body in ({"containers": []}, {"containers": [1]}):
        await store.write(lambda transaction, body=body: nodes.save_samples(transaction, "n1", THEN, body))
    assert await store.read(nodes.saved_samples) == {"n1": (THEN, {"containers": [1]})}
    await store.write(lambda transaction: nodes.rows.delete(transaction, "n1"))
    assert await store.read(nodes.saved_samples) == {}
    for hash, expires in (("old", "2025"), ("new", "2027")):
        token = JoinToken(hash, None, expires)
        await store.write(lambda transaction, token=token: nodes.join_tokens.insert(transaction, token))
    await store.write(lambda transaction: nodes.drop_expired_join_tokens(transaction, "2026"))
    assert [token.hash for token in await store.read(nodes.join_tokens.all)] == ["new"]


# ---------------------------------------------------------------- the schema


def test_the_migrations_make_the_tables_of_the_models(url: str) -> None:
    schema.upgrade(url)
    engine = make_engine(url, writer=True)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, metadata)
    engine.dispose()
    assert differences == []


def test_an_empty_database_says_what_to_do(url: str) -> None:
    with pytest.raises(Conflict, match="controller init"):
        schema.check(url)
    schema.upgrade(url)
    schema.upgrade(url)
    schema.check(url)


def test_another_revision_is_refused_and_says_what_to_do(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schema.upgrade(url)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "revisions", lambda _: ("0001", "0002"))
        with pytest.raises(Conflict, match=r"0001.*needs 0002.*upgrade-db"):
            schema.check(url)
    _set_revision(url, "9999")
    for refuse in (schema.check, schema.upgrade):
        with pytest.raises(Conflict, match=r"9999.*wrote it, or a newer"):
            refuse(url)


def _set_revision(url: str, revision: str) -> None:
    engine = make_engine(url, writer=True)

    def change(connection: Connection) -> None:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})

    with engine.begin() as connection:
        change(connection)
    engine.dispose()


def test_an_upgrade_keeps_every_row(url: str) -> None:
    schema.upgrade(url, "0001")
    engine = make_engine(url, writer=True)
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO nodes (name, public_key, added_at, description) VALUES ('n', 'k', 't', '')")
        )
        connection.execute(
            text(
                "INSERT INTO containers (id, node, generation, hostname, description, config, hwaddr, created_at, "
                "phase, reserved_memory, reserved_disk) VALUES ('c', 'n', 7, 'h', '', '{}', 'm', 't', 'ready', 1, 2)"
            )
        )
        connection.execute(
            text("INSERT INTO snapshots (container, name, created_at, config) VALUES ('c', 's', 't', '{}')")
        )
    schema.upgrade(url)
    schema.check(url)
    with engine.begin() as connection:
        node, container = nodes.rows.get(connection, "n"), containers.rows.get(connection, "c")
        assert node is not None
        assert container is not None
        assert (node.mode, node.fenced_at) == (NodeMode.ACTIVE, None)
        assert (container.generation, container.power) == (7, None)
        assert [snapshot.name for snapshot in containers.all_snapshots(connection, "c")] == ["s"]
    engine.dispose()


def test_a_file_is_copied_before_an_upgrade(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    schema.upgrade(url, "0001")
    schema.upgrade(url)
    copy = sqlite3.connect(tmp_path / "store.db.before-0001")
    assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    copy.close()


async def test_nodes_do_not_stand_in_the_log_alone(tmp_path: Path) -> None:
    """Whatever happens to the log, the keys of the nodes are known: they know what was lost."""
    file = tmp_path / "store.db"
    url = f"sqlite:///{file}"
    await asyncio.to_thread(schema.upgrade, url)
    store = Store(url)
    await store.open()
    await store.write(lambda transaction: nodes.rows.insert(transaction, NODE))
    await store.write(add(ROW))
    copy = tmp_path / "without-log.db"
    copy.write_bytes(file.read_bytes())
    await store.close()
    found = sqlite3.connect(copy)
    assert found.execute("SELECT name FROM nodes").fetchall() == [("n1",)]
    assert found.execute("SELECT id FROM containers").fetchall() == []
    found.close()


@pytest.mark.parametrize("took_place", [True, False])
async def test_a_commit_whose_answer_was_lost_is_looked_up(
    postgresql: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took_place: bool
) -> None:
    with postgresql.database() as url:
        await asyncio.to_thread(schema.upgrade, url)
        store = Store(url, Mark(tmp_path / "mark"))
        await store.open()
        await store.write(lambda transaction: nodes.rows.insert(transaction, NODE))
        dialect = store._writer_engine.dialect
        commit = dialect.do_commit

        def lose_the_answer(connection: Any) -> None:
            monkeypatch.setattr(dialect, "do_commit", commit)
            if took_place:
                commit(connection)
            connection.driver_connection.close()
            raise psycopg.OperationalError("the server closed the connection")

        monkeypatch.setattr(dialect, "do_commit", lose_the_answer)
        writing = store.write(add(ROW))
        if took_place:
            assert await writing == ROW
        else:
            with pytest.raises(Unavailable):
                await writing
        assert await ids(store) == ({"101"} if took_place else set())
        assert ("101" in {change.key for change in store.heard}) is took_place
        await store.write(add(numbered(2)))
        await store.close()
