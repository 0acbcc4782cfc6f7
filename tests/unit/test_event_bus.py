"""The bus of events over a real store: no gap, no repetition, from any place; who is too slow; what is bounded."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from common.clock import ManualClock
from common.errors import Unavailable
from controller import events as bus
from controller.events import Events
from controller.records import Change, Event, EventType, Operation
from controller.store import events as rows
from controller.store.db import Database, Transaction
from controller.store.telling import draft
from controller.subscriptions import Renderer, Resync, Subscription, Wants
from tests.helpers.core import make_template
from tests.unit.test_telling import OPERATION

ALL = Wants(tuple(EventType))
LAST = "9999"


class Numbers(Renderer):
    """An event is its number, a resync has an R before it, figures an M."""

    def __init__(self) -> None:
        self.rendered = 0

    def event(self, event: Event) -> bytes:
        self.rendered += 1
        return f"{event.sequence} ".encode()

    def resync(self, resync: Resync) -> bytes:
        return f"R{resync.sequence} ".encode()

    def metric(self, container: str) -> bytes:
        return f"M{container} ".encode()

    def progress(self, operation: str) -> bytes:
        return b"" if operation == "ended" else f"P{operation} ".encode()


class Fixture:
    """A store, its bus, and what it takes to tell and to listen."""

    def __init__(self, url: str, kept: int) -> None:
        self.store = Database(url, self._committed, chronicle=rows.EventLog(ManualClock()))
        self.events = Events(self.store, kept=kept)
        self.renderer = Numbers()
        self.ends: list[tuple[int, str]] = []

    def _committed(self, changes: Sequence[Change]) -> None:
        self.events.publish([change.record for change in changes if isinstance(change.record, Event)])

    async def tell(self, count: int, container: str | None = None) -> None:
        def work(transaction: Transaction) -> None:
            for _ in range(count):
                rows.tell(transaction, draft("test", "/test", container=container))

        await self.store.write(work)

    async def prune(self, keep: int) -> None:
        await self.store.write(lambda transaction: rows.prune(transaction, "", keep))

    def subscribe(self, since: int | None = None, wants: Wants = ALL) -> Subscription:
        def on_end(code: int, reason: str) -> None:
            self.ends.append((code, reason))
            subscription.leave()

        latest = self.events.latest
        subscription = self.events.subscribe(wants, latest if since is None else since, self.renderer, on_end)
        return subscription


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
async def made(template: Path, tmp_path: Path) -> AsyncIterator[Fixture]:
    shutil.copy(template, tmp_path / "bus.db")
    fixture = Fixture(f"sqlite:///{tmp_path / 'bus.db'}", kept=10)
    await fixture.store.open()
    await fixture.events.open()
    yield fixture
    await fixture.events.close()
    await fixture.store.close()


async def collect(subscription: Subscription, last: int) -> list[str]:
    """All that comes until its place is `last`."""
    found: list[str] = []
    while subscription.position < last:
        found += (await subscription.next()).decode().split()
    return found


def numbers(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last + 1)]


async def test_without_a_place_it_begins_now(made: Fixture) -> None:
    await made.tell(3)
    subscription = made.subscribe()
    await made.tell(2)
    assert await collect(subscription, 5) == numbers(4, 5)


@pytest.mark.parametrize("since", [0, 1, 4, 24, 29, 30])
async def test_from_any_place_all_that_follows_comes_once(made: Fixture, since: int) -> None:
    made.subscribe()
    await made.tell(25)
    await made.tell(5)
    subscription = made.subscribe(since)
    told = asyncio.ensure_future(made.tell(5))
    assert await collect(subscription, 35) == numbers(since + 1, 35)
    await told


@pytest.mark.parametrize("seed", range(10))
async def test_readers_at_random_paces_miss_nothing(made: Fixture, seed: int) -> None:
    """Writers, and readers that come, pause, leave and resume: each has every number once, across table and memory."""
    chance = random.Random(seed)
    total = 300

    async def write() -> None:
        written = 0
        while written < total:
            count = min(chance.choice([1, 1, 2, 15]), total - written)
            await made.tell(count)
            written += count
            await asyncio.sleep(chance.choice([0, 0, 0.001]))

    async def read() -> list[str]:
        found: list[str] = []
        position = 0
        while position < total:
            subscription = made.subscribe(position)
            for _ in range(chance.randrange(1, 20)):
                if subscription.position >= total:
                    break
                found += (await subscription.next()).decode().split()
                await asyncio.sleep(chance.choice([0, 0, 0.002]))
            position = subscription.position
            subscription.leave()
        return found

    _, *read_by = await asyncio.gather(write(), *(read() for _ in range(5)))
    assert all(found == numbers(1, total) for found in read_by)


async def test_a_seam_that_skips_is_caught(made: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same look finds the gap when the memory is taken for complete where it is not."""
    made.subscribe()
    await made.tell(30)
    real = Events.after
    monkeypatch.setattr(Events, "after", lambda self, position: real(self, max(position, self._first - 1)))
    assert await collect(made.subscribe(0), 30) != numbers(1, 30)


async def test_what_was_pruned_is_a_resync_at_once(made: Fixture) -> None:
    await made.tell(30)
    await made.prune(keep=5)
    # The oldest that is left is 26: whoever has 25 misses nothing.
    assert await collect(made.subscribe(25), 30) == numbers(26, 30)
    for since in (0, 10, 24):
        assert await collect(made.subscribe(since), 30) == ["R30"]


async def test_a_log_that_is_pruned_before_a_reader_got_there_is_a_resync(
    made: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "PAGE", 5)
    await made.tell(30)
    subscription = made.subscribe(0)
    assert (await subscription.next()).decode().split() == numbers(1, 5)
    await made.prune(keep=5)
    await made.tell(1)
    assert await collect(subscription, 31) == ["R31"]


async def test_a_number_that_never_was_is_a_resync(made: Fixture) -> None:
    await made.tell(3)
    subscription = made.subscribe(1000)
    assert (await subscription.next()).decode() == "R3 "
    await made.tell(1)
    assert await collect(subscription, 4) == ["4"]


async def test_a_leap_in_the_log_is_a_resync(made: Fixture) -> None:
    await made.tell(3)
    live = made.subscribe()
    await made.store.write(lambda transaction: rows.tell(transaction, draft(rows.RESTORED, "/1.0")))
    last = await made.store.read(rows.latest)
    assert last > rows.LEAP
    assert await collect(live, last) == [f"R{last}"]
    for since, before in ((2, ["3"]), (3, []), (500, [])):
        assert await collect(made.subscribe(since), last) == [*before, f"R{last}"]


async def test_who_takes_no_more_is_dropped_and_resumes_without_loss(made: Fixture) -> None:
    slow, idle = made.subscribe(), made.subscribe()
    await made.tell(1)
    assert await collect(slow, 1) == ["1"] and await collect(idle, 1) == ["1"]
    slow.sending = True
    await made.tell(10)
    assert made.ends == []
    await made.tell(1)
    assert made.ends == [(1013, "too slow; resume with since=1")]
    assert slow not in made.events.subscriptions
    # One that merely has not had its turn is not slow.
    assert await collect(idle, 12) == numbers(2, 12)
    assert await collect(made.subscribe(1), 12) == numbers(2, 12)


async def test_who_catches_up_is_not_dropped_for_being_behind(made: Fixture) -> None:
    await made.tell(50)
    behind = made.subscribe(0)
    behind.sending = True
    await made.tell(50)
    assert made.ends == [] and await collect(behind, 100) == numbers(1, 100)


async def test_memory_is_bounded_by_number_and_bytes(made: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    await made.tell(100)
    assert made.events.kept == 0, "nobody listens: nothing is kept"
    made.subscribe()
    await made.tell(100)
    assert made.events.kept == 10
    small = Events(made.store, kept=1000, kept_bytes=1000)
    small.latest = 200
    small.subscribe(ALL, 200, made.renderer, lambda code, reason: None)
    large = draft("test", "/test", context={"text": "x" * 300})
    small.publish([Event(201 + n, "", large.type, "a", "/", None, None, large.body) for n in range(50)])
    assert small.kept == 2 and small._size <= 1000


async def test_an_event_is_rendered_once_for_all(made: Fixture) -> None:
    listeners = [made.subscribe() for _ in range(20)]
    await made.tell(5)
    for listener in listeners:
        assert await collect(listener, 5) == numbers(1, 5)
    assert made.renderer.rendered == 5


async def test_only_what_was_asked_for_comes(made: Fixture) -> None:
    nothing_yet = made.subscribe(0, Wants((EventType.OPERATION,)))
    of_one = made.subscribe(0, Wants(tuple(EventType), container="c"))
    await made.tell(1, "c")
    await made.tell(1, "d")
    await made.tell(1, "c")
    assert (await of_one.next()).decode().split() == ["1", "3"]
    waiting = asyncio.ensure_future(nothing_yet.next())
    await asyncio.sleep(0.05)
    assert not waiting.done() and nothing_yet.position == 3
    waiting.cancel()


async def test_figures_wait_in_one_place_each(made: Fixture) -> None:
    some = made.subscribe(wants=Wants((), metrics=frozenset({"a", "b"})))
    every = made.subscribe(wants=Wants((), metrics=None))
    none = made.subscribe()
    for _ in range(1000):
        made.events.sampled(["a", "c"])
    assert (await some.next()).decode().split() == ["Ma"]
    assert (await every.next()).decode().split() == ["Ma", "Mc"]
    assert not some._dirty and not every._dirty and not none._dirty
    made.events.sampled(["b"])
    await made.tell(1)
    assert (await some.next()).decode().split() == ["Mb"]


async def test_a_limit_of_listeners(made: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "MAX_SUBSCRIBERS", 2)
    made.subscribe()
    second = made.subscribe()
    with pytest.raises(Unavailable):
        made.events.require_room()
    second.leave()
    made.events.require_room()


async def test_at_the_end_all_are_told_where_to_go_on(made: Fixture) -> None:
    await made.tell(4)
    made.subscribe()
    await made.events.close()
    assert made.ends == [(1001, "the controller stops; resume with since=4")]
    with pytest.raises(Unavailable):
        made.events.require_room()


# ---------------------------------------------------------------- progress


def under_way(id: str, *containers: str) -> Operation:
    return msgspec.structs.replace(OPERATION, id=id, containers=containers)


async def recorded(made: Fixture, operation: str) -> None:
    """An operation's event is told."""
    event = Event(0, "", EventType.OPERATION, "operation-ended", f"/1.0/operations/{operation}", None, None, {})
    await made.store.write(lambda transaction: rows.tell(transaction, event))


async def next_words(subscription: Subscription) -> list[str]:
    async with asyncio.timeout(5):
        return (await subscription.next()).decode().split()


async def test_progress_is_told_once_for_all_that_came_of_it_meanwhile(made: Fixture) -> None:
    subscription = made.subscribe()
    for operation in ("a", "b", "a", "a"):
        made.events.progressed(under_way(operation))
    assert await next_words(subscription) == ["Pa", "Pb"]
    made.events.progressed(under_way("a"))
    assert await next_words(subscription) == ["Pa"]
    assert made.events.latest == 0, "none of it is an event with a number"


async def test_progress_goes_to_those_who_listen_to_operations_and_to_this_container(made: Fixture) -> None:
    everybody, nobody = made.subscribe(), made.subscribe(wants=Wants((EventType.LIFECYCLE,)))
    one, other = (made.subscribe(wants=Wants((EventType.OPERATION,), container)) for container in ("c", "d"))
    made.events.progressed(under_way("a", "b", "c"))
    assert await next_words(everybody) == await next_words(one) == ["Pa"]
    await made.tell(1, container="d")
    assert await next_words(nobody) == ["1"]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await other.next()


async def test_no_progress_is_told_after_what_was_recorded_later(made: Fixture) -> None:
    subscription = made.subscribe()
    made.events.progressed(under_way("a"))
    made.events.progressed(under_way("b"))
    await recorded(made, "a")
    assert await next_words(subscription) == ["1", "Pb"]


async def test_an_operation_that_has_ended_tells_no_progress(made: Fixture) -> None:
    subscription = made.subscribe()
    made.events.progressed(under_way("ended"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await subscription.next()


async def test_who_is_behind_hears_of_progress_when_he_has_all_events(made: Fixture) -> None:
    await made.tell(300)
    subscription = made.subscribe(since=0)
    made.events.progressed(under_way("a"))
    found = await collect(subscription, 300)
    found += [] if found[-1] == "Pa" else await next_words(subscription)
    assert found == [*numbers(1, 300), "Pa"]


async def test_a_slow_one_has_nothing_waiting_but_the_newest(made: Fixture) -> None:
    subscription = made.subscribe()
    subscription.sending = True
    for _ in range(10_000):
        made.events.progressed(under_way("a"))
    assert not made.ends and not subscription.ended
    assert await next_words(subscription) == ["Pa"]
