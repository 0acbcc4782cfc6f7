"""The log of events on SQLite and on PostgreSQL: numbered without gaps, written with what it tells, never reused."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from common.clock import ManualClock, timestamp
from common.errors import Conflict, NoSpace
from controller.records import Change, Event, Node
from controller.store import events, nodes, schema
from controller.store.db import Database, Transaction
from controller.store.telling import draft
from tests.helpers.postgresql import Server, server

pytestmark = pytest.mark.xdist_group("postgresql")
THEN = "2026-01-01T00:00:00.000000Z"
Work = Callable[[Transaction], Any]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Server]:
    with server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database at the present schema."""
    if request.param == "sqlite":
        made = f"sqlite:///{tmp_path / 'store.db'}"
        schema.upgrade(made)
        yield made
        return
    running: Server = request.getfixturevalue("postgresql")
    with running.database() as made:
        schema.upgrade(made)
        yield made


class Store(Database):
    """A database with a log of events, whose listener keeps what it heard."""

    def __init__(self, url: str, log: events.EventLog | None = None) -> None:
        self.heard: list[Event] = []
        super().__init__(url, self._hear, chronicle=log or events.EventLog(ManualClock()))

    def _hear(self, changes: Sequence[Change]) -> None:
        self.heard += [change.record for change in changes if isinstance(change.record, Event)]

    async def together(self, works: Sequence[Work]) -> list[Any]:
        """Have the writer find all of these at once."""
        free = threading.Event()
        blocked = asyncio.ensure_future(self.write(lambda _transaction: free.wait(10)))
        await asyncio.sleep(0)
        writes = [asyncio.ensure_future(self.write(work)) for work in works]
        await asyncio.sleep(0)
        free.set()
        await blocked
        return await asyncio.gather(*writes, return_exceptions=True)

    async def kept(self) -> list[Event]:
        """All that is in the table."""
        return await self.read(lambda connection: events.page(connection, 0, 10**6))


@asynccontextmanager
async def opened(url: str, log: events.EventLog | None = None) -> AsyncIterator[Store]:
    store = Store(url, log)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def tell(count: int, fails: bool = False) -> Work:
    def work(transaction: Transaction) -> None:
        for number in range(count):
            events.tell(transaction, draft("test", f"/{number}"))
        if fails:
            raise Conflict("no")

    return work


def join(name: str, fails: bool = False) -> Work:
    def work(transaction: Transaction) -> None:
        nodes.rows.insert(transaction, Node(name, name.rjust(40), THEN))
        if fails:
            raise Conflict("no")

    return work


def gapless(found: Sequence[Event]) -> bool:
    return [event.sequence for event in found] == list(range(1, len(found) + 1))


async def test_events_are_written_with_what_they_tell_and_heard_after_it(url: str) -> None:
    async with opened(url) as store:
        await store.write(join("n1"))
        (event,) = await store.kept()
        assert (event.sequence, event.action, event.at) == (1, "node-joined", timestamp(ManualClock().now()))
        assert store.heard == [event]


async def _random_jobs(store: Store, seed: int) -> int:
    """Jobs of which some fail, in batches and alone; returns how many events there must be."""
    chance = random.Random(seed)
    told = 0
    for round in range(12):
        jobs: list[Work] = []
        for number in range(chance.choice([1, 1, 5, 30])):
            fails = chance.random() < 0.4
            count = chance.choice([0, 1, 1, 3])
            joins = chance.random() < 0.3
            jobs.append(join(f"n{round}-{number}", fails) if joins else tell(count, fails))
            told += 0 if fails else 1 if joins else count
        if len(jobs) == 1:
            await asyncio.gather(store.write(jobs[0]), return_exceptions=True)
        else:
            await store.together(jobs)
    return told


@pytest.mark.parametrize("seed", range(8))
async def test_numbers_have_no_gap_whatever_fails(url: str, seed: int) -> None:
    async with opened(url) as store:
        told = await _random_jobs(store, seed)
        kept = await store.kept()
        assert len(kept) == told and gapless(kept) and store.heard == kept


class Failing(events.EventLog):
    """Every third commit fails after its numbers were given; they are used up then, or given back."""

    giving_back = True
    calls = 0

    def write(self, connection: Connection, drafts: Sequence[Event]) -> list[Event]:
        numbered = super().write(connection, drafts)
        if not self.giving_back:
            self.committed(numbered)
        self.calls += 1
        if self.calls % 3 == 0:
            raise NoSpace("full")
        return numbered


@pytest.mark.parametrize("giving_back", [True, False])
async def test_a_commit_that_fails_gives_its_numbers_back(url: str, giving_back: bool) -> None:
    log = Failing(ManualClock())
    log.giving_back = giving_back
    async with opened(url, log) as store:
        results = [await asyncio.gather(store.write(tell(2)), return_exceptions=True) for _ in range(10)]
        assert sum(isinstance(result[0], NoSpace) for result in results) == 3
        # A log that does not give them back is caught by the same look.
        assert gapless(await store.kept()) == giving_back


async def test_after_a_restart_the_numbers_go_on(url: str) -> None:
    async with opened(url) as store:
        await store.write(tell(3))
    async with opened(url) as store:
        await store.write(tell(2))
        assert gapless(await store.kept()) and len(await store.kept()) == 5


async def test_no_number_is_used_again_when_all_was_pruned(url: str) -> None:
    async with opened(url) as store:
        await store.write(tell(5))
        while await store.write(lambda transaction: events.prune(transaction, "9999", keep=1)):
            pass
        assert [event.sequence for event in await store.kept()] == [5]
    async with opened(url) as store:
        await store.write(tell(1))
        assert [event.sequence for event in await store.kept()] == [5, 6]


async def test_after_lost_commits_the_numbers_leap(url: str) -> None:
    async with opened(url) as store:
        await store.write(tell(2))
        await store.write(lambda transaction: events.tell(transaction, draft(events.RESTORED, "/1.0")))
        await store.write(tell(1))
        assert [event.sequence for event in await store.kept()] == [1, 2, 2 + events.LEAP, 3 + events.LEAP]


async def test_the_oldest_are_pruned_in_small_batches(url: str) -> None:
    clock = ManualClock()
    async with opened(url, events.EventLog(clock)) as store:
        await store.write(tell(10))
        clock.advance(100)
        await store.write(tell(10))
        before = timestamp(clock.now())

        async def prune(keep: int, limit: int) -> int:
            return await store.write(lambda transaction: events.prune(transaction, before, keep, limit))

        # By age: the first ten, four at a time.
        assert [await prune(1000, 4) for _ in range(4)] == [4, 4, 2, 0]
        # By number: all but the last three.
        assert [await prune(3, 5) for _ in range(3)] == [5, 2, 0]
        assert [event.sequence for event in await store.kept()] == [18, 19, 20]


async def test_pages_come_in_order(url: str) -> None:
    async with opened(url) as store:
        await store.write(tell(7))
        page = await store.read(lambda connection: events.page(connection, 2, 3))
        assert [event.sequence for event in page] == [3, 4, 5]
        assert await store.read(lambda connection: events.page(connection, 7, 3)) == []
