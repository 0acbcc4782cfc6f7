"""The relay: what is put is got, in constant memory; whoever breaks off breaks both ways, and both may come again."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tracemalloc

import pytest

from common.errors import Cancelled, DeadlinePassed, Stale, Unauthorized, VzfleetError
from controller.relay import Receiver, Relay, Sender


async def collect(receiver: Receiver) -> bytes:
    return b"".join([chunk async for chunk in receiver])


async def put(sender: Sender, *chunks: bytes) -> int:
    for chunk in chunks:
        await sender.write(chunk)
    return await sender.finish()


async def ending(task: asyncio.Future[object]) -> BaseException | None:
    """What a task ends with, within a second."""
    await asyncio.wait([task], timeout=1)
    assert task.done()
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def test_both_ways_at_once() -> None:
    relay = Relay()
    way = relay.open("op")
    results = await asyncio.gather(
        put(relay.sender(way.source.put), b"abc", b"", b"defg"),
        put(relay.sender(way.target.put), b"back"),
        collect(relay.receiver(way.source.get)),
        collect(relay.receiver(way.target.get)),
    )
    assert results == [7, 4, b"back", b"abcdefg"]


@pytest.mark.parametrize("seed", range(5))
async def test_any_sizes_at_any_speed(seed: int) -> None:
    chance = random.Random(seed)
    chunks = [chance.randbytes(chance.choice((0, 1, 10, 1000, 5000))) for _ in range(300)]
    relay = Relay(capacity=2000, idle_timeout=10)
    way = relay.open("op")
    sending = asyncio.create_task(put(relay.sender(way.source.put), *chunks))
    arrived = hashlib.sha256()
    async for chunk in relay.receiver(way.target.get):
        arrived.update(chunk)
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
    assert arrived.digest() == hashlib.sha256(b"".join(chunks)).digest()
    assert await sending == sum(map(len, chunks))


async def test_memory_stays_the_same_whatever_the_size() -> None:
    relay = Relay(capacity=1024 * 1024)
    way = relay.open("op")
    sender = relay.sender(way.source.put)

    async def large() -> int:
        for _ in range(2000):
            await sender.write(bytes(256 * 1024))
        return await sender.finish()

    tracemalloc.start()
    try:
        sending = asyncio.create_task(large())
        total = 0
        async for chunk in relay.receiver(way.target.get):
            total += len(chunk)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert total == await sending == 2000 * 256 * 1024


async def test_the_sender_waits_for_the_receiver() -> None:
    relay = Relay(capacity=1000)
    way = relay.open("op")
    sending = asyncio.create_task(put(relay.sender(way.source.put), *[bytes(400)] * 10))
    for _ in range(20):
        await asyncio.sleep(0)
    assert way.meeting is not None
    assert way.meeting.streams[way.source.put].sent == 800, "no more than the capacity"
    assert len(await collect(relay.receiver(way.target.get))) == 4000
    await sending


async def test_tokens_depend_on_key_and_name_alone() -> None:
    relay, same, other = Relay(b"k" * 32), Relay(b"k" * 32), Relay(b"o" * 32)
    way = relay.open("op-1")
    assert relay.open("op-1") is way
    assert same.open("op-1").tokens == way.tokens
    ways = (way, relay.open("op-2"), other.open("op-1"), Relay().open("op-1"))
    assert len({token for one in ways for token in one.tokens}) == 16
    assert all(len(token) == 64 for token in way.tokens)


async def test_tokens_are_for_their_direction_only() -> None:
    relay = Relay()
    way = relay.open("op")
    for wrong in ("", "x", way.source.get, way.target.get, way.source.put[:-1], way.source.put + "x", "é\udce9"):
        with pytest.raises(Unauthorized):
            relay.sender(wrong)
    for wrong in (way.source.put, way.target.put, ""):
        with pytest.raises(Unauthorized):
            relay.receiver(wrong)
    relay.close("op")
    with pytest.raises(Unauthorized):
        relay.sender(way.source.put)


async def test_one_connection_that_breaks_breaks_all_four() -> None:
    relay = Relay()
    way = relay.open("op")
    sides = [relay.sender(way.source.put), relay.sender(way.target.put)]
    tasks = [asyncio.create_task(collect(relay.receiver(token))) for token in (way.source.get, way.target.get)]
    await asyncio.sleep(0)
    sides[0].abort("its connection broke")
    for task in tasks:
        error = await ending(task)
        assert isinstance(error, Cancelled) and "its connection broke" in error.text
    with pytest.raises(Cancelled):
        await sides[1].write(b"x")


async def test_both_come_again_with_the_same_tokens() -> None:
    relay = Relay()
    way = relay.open("op")
    await relay.sender(way.source.put).write(b"lost")
    broken = relay.receiver(way.target.get)
    again = relay.sender(way.source.put)
    with pytest.raises(Stale, match="anew"):
        await collect(broken)
    receiving = asyncio.create_task(collect(relay.receiver(way.target.get)))
    assert await put(again, b"whole") == 5
    assert await receiving == b"whole"


async def test_a_late_break_of_an_old_connection_leaves_the_new_ones_alone() -> None:
    relay = Relay()
    way = relay.open("op")
    old = relay.sender(way.source.put)
    new = relay.sender(way.source.put)
    old.abort("its connection broke")
    receiving = asyncio.create_task(collect(relay.receiver(way.target.get)))
    assert await put(new, b"x") == 1
    assert await receiving == b"x"


async def test_an_end_that_is_done_takes_nothing_with_it() -> None:
    relay = Relay()
    way = relay.open("op")
    sender, receiver = relay.sender(way.source.put), relay.receiver(way.target.get)
    back = asyncio.create_task(collect(relay.receiver(way.source.get)))
    receiving = asyncio.create_task(collect(receiver))
    await put(sender, b"all")
    sender.abort("its connection is closed")
    await receiving
    receiver.abort("its connection is closed")
    await asyncio.sleep(0)
    assert not back.done()
    await put(relay.sender(way.target.put), b"and back")
    assert await back == b"and back"


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_a_side_that_is_cancelled_takes_the_others_with_it(side: str) -> None:
    relay = Relay(capacity=10)
    way = relay.open("op")
    sender, receiver = relay.sender(way.source.put), relay.receiver(way.target.get)
    if side == "sender":
        await sender.write(bytes(10))
        waiting: asyncio.Task[object] = asyncio.create_task(sender.write(bytes(10)))
    else:
        waiting = asyncio.create_task(collect(receiver))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    with pytest.raises(Cancelled):
        await (collect(receiver) if side == "sender" else sender.write(b"x"))


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_idle_for_too_long(side: str) -> None:
    relay = Relay(capacity=10, idle_timeout=0.05)
    way = relay.open("op")
    if side == "sender":
        work: asyncio.Task[object] = asyncio.create_task(put(relay.sender(way.source.put), bytes(10), bytes(10)))
    else:
        work = asyncio.create_task(collect(relay.receiver(way.target.get)))
    assert isinstance(await ending(work), DeadlinePassed)
    assert way.meeting is not None and way.meeting.over


async def test_close_ends_all_and_is_idempotent() -> None:
    relay = Relay()
    way = relay.open("op")
    receiving = asyncio.create_task(collect(relay.receiver(way.target.get)))
    await asyncio.sleep(0)
    assert relay.open_ways == ["op"]
    relay.close("op")
    relay.close("op")
    assert relay.open_ways == []
    assert isinstance(await ending(receiving), Cancelled)


@pytest.mark.parametrize("seed", range(20))
async def test_however_it_ends_nothing_cut_looks_complete(seed: int) -> None:
    """Breaks at random moments: a stream that ends well has all its bytes."""
    chance = random.Random(seed)
    relay = Relay(capacity=100, idle_timeout=5)
    way = relay.open("op")
    chunks = [chance.randbytes(chance.randrange(1, 80)) for _ in range(30)]
    sending = asyncio.create_task(put(relay.sender(way.source.put), *chunks))
    receiving = asyncio.create_task(collect(relay.receiver(way.target.get)))
    for _ in range(chance.randrange(80)):
        await asyncio.sleep(0)
    chance.choice(
        (lambda: relay.close("op"), sending.cancel, receiving.cancel, lambda: relay.receiver(way.target.get))
    )()
    await asyncio.wait([sending, receiving], timeout=10)
    assert sending.done() and receiving.done()
    if receiving.cancelled() or receiving.exception() is not None:
        assert sending.cancelled() or isinstance(sending.exception(), VzfleetError) or sending.result()
    else:
        assert receiving.result() == b"".join(chunks)
