"""Notes: written in order, never waited for, bounded, and what is said anew replaces what waits on a full disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from common.errors import Internal, NoSpace
from common.tasks import Tasks
from controller import notes as module
from controller.notes import Notes
from controller.records import Event
from controller.store.db import Database, Transaction
from tests.helpers.cluster import until


class Store:
    """Takes writes, or refuses them."""

    def __init__(self) -> None:
        self.refuses: Exception | None = None
        self.impossible: set[str] = set()
        self.told: list[str] = []
        self.batches = 0

    async def write(self, work: Callable[[Transaction], Any]) -> None:
        transaction = Transaction(cast(Any, None))
        work(transaction)
        if self.refuses is not None:
            raise self.refuses
        if any(change.key in self.impossible for change in transaction.changes):
            raise Internal("it cannot be written")
        self.batches += 1
        self.told += [
            f"{change.record.action} {change.record.source}"
            for change in transaction.changes
            if isinstance(change.record, Event)
        ]


def make() -> tuple[Store, Notes]:
    store = Store()
    return store, Notes(cast(Database, store), Tasks("notes"), retry_delay=0.01)


async def test_in_order_and_together() -> None:
    store, notes = make()
    for number in range(5):
        notes.add("a" if number % 2 else "b", "/x")
    assert store.told == [], "nobody waits for it"
    await until(lambda: not len(notes), "written")
    assert store.told == ["b /x", "a /x", "b /x", "a /x", "b /x"] and store.batches == 1


async def test_while_the_disk_is_full_the_last_of_each_waits() -> None:
    store, notes = make()
    store.refuses = NoSpace("full")
    for number in range(1000):
        notes.add("on" if number % 2 else "off", f"/{number % 3}")
    await until(lambda: len(notes) == 6, "the same said anew replaces it")
    for number in range(1000):
        notes.add("on" if number % 2 else "off", f"/{number % 3}")
    assert len(notes) == 6
    store.refuses = None
    await until(lambda: not len(notes), "written when there is room")
    assert store.told == ["off /1", "on /2", "off /0", "on /1", "off /2", "on /0"]
    notes.add("on", "/9")
    notes.add("on", "/9")
    await until(lambda: not len(notes), "written")
    assert store.told[6:] == ["on /9", "on /9"]


async def test_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 10)
    store, notes = make()
    store.refuses = NoSpace("full")
    for number in range(100):
        notes.add("a", f"/{number}")
    assert len(notes) == 10
    store.refuses = None
    await until(lambda: not len(notes), "written")
    assert store.told == [f"a /{number}" for number in range(90, 100)]


async def test_what_cannot_be_written_at_all_is_not_tried_for_ever() -> None:
    store, notes = make()
    store.refuses = Internal("a fault")
    notes.add("a", "/x")
    await until(lambda: not len(notes), "given up")
    store.refuses = None
    notes.add("b", "/x")
    await until(lambda: not len(notes), "written")
    assert store.told == ["b /x"]


async def test_one_that_cannot_be_written_takes_no_other_with_it() -> None:
    store, notes = make()
    store.impossible.add("/2")
    for number in range(5):
        notes.add("a", f"/{number}")
    await until(lambda: not len(notes), "written")
    assert store.told == ["a /0", "a /1", "a /3", "a /4"]


async def test_strange_names_fit_their_columns() -> None:
    _store, notes = make()
    notes.add("a", "/1.0/vz/\0" + "x" * 1000, container="y" * 1000, node="z" * 1000)
    (event,) = notes.waiting
    assert len(event.source) == 255 and "\0" not in event.source
    assert event.container is not None and event.node is not None
    assert (len(event.container), len(event.node)) == (64, 63)
    await until(lambda: not len(notes), "written")


async def test_at_the_end_what_waits_is_written_or_left_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_TRY", 0.05)
    store, notes = make()
    notes.add("a", "/x")
    await notes.close()
    assert store.told == ["a /x"]
    store.refuses = NoSpace("full")
    notes.add("b", "/x")
    await notes.close()
    await notes._tasks.close()
