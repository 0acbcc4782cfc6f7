"""The relay: what is sent arrives whole, or both sides get an error."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from common.errors import Cancelled, DeadlinePassed, Stale, Unauthorized, VzfleetError
from controller.relay import Receiver, Relay


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def collect(receiver: Receiver) -> bytes:
    return b"".join([chunk async for chunk in receiver])


async def ending(work: asyncio.Task[object]) -> BaseException | None:
    """How a task ended: its error, or None."""
    await asyncio.wait([work], timeout=10)
    assert work.done(), "it hangs"
    return work.exception()


async def test_a_stream_arrives_whole() -> None:
    relay = Relay()
    seen: list[int] = []
    transfer = relay.open("op1", progress=seen.append)
    sending = asyncio.create_task(relay.send(transfer.send, stream(b"abc", b"", b"defg")))
    assert await collect(relay.receive(transfer.receive)) == b"abcdefg"
    assert await sending == 7
    assert transfer.complete and (transfer.sent, transfer.received) == (7, 7)
    assert seen == [3, 7]


async def test_an_empty_stream_has_an_end_too() -> None:
    relay = Relay()
    transfer = relay.open("op1")
    sending = asyncio.create_task(relay.send(transfer.send, stream()))
    assert await collect(relay.receive(transfer.receive)) == b""
    assert await sending == 0


@pytest.mark.parametrize("seed", range(5))
async def test_any_sizes_at_any_speed(seed: int) -> None:
    chance = random.Random(seed)
    chunks = [chance.randbytes(chance.choice((0, 1, 10, 1000, 5000))) for _ in range(300)]
    relay = Relay(capacity=2000, idle_timeout=10)
    transfer = relay.open("op")

    async def hesitant() -> AsyncIterator[bytes]:
        for chunk in chunks:
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            yield chunk

    sending = asyncio.create_task(relay.send(transfer.send, hesitant()))
    arrived = hashlib.sha256()
    async for chunk in relay.receive(transfer.receive):
        arrived.update(chunk)
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
    assert arrived.digest() == hashlib.sha256(b"".join(chunks)).digest()
    assert await sending == sum(map(len, chunks))


async def test_memory_stays_the_same_whatever_the_size() -> None:
    relay = Relay(capacity=1024 * 1024)
    transfer = relay.open("op")

    async def large() -> AsyncIterator[bytes]:
        for _ in range(2000):
            yield bytes(256 * 1024)

    tracemalloc.start()
    try:
        sending = asyncio.create_task(relay.send(transfer.send, large()))
        total = 0
        async for chunk in relay.receive(transfer.receive):
            total += len(chunk)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert total == await sending == 2000 * 256 * 1024


async def test_the_sender_waits_for_the_receiver() -> None:
    relay = Relay(capacity=1000)
    transfer = relay.open("op")
    sending = asyncio.create_task(relay.send(transfer.send, stream(*[bytes(400)] * 10)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert transfer.sent == 800, "no more than the capacity"
    receiver = relay.receive(transfer.receive)
    await anext(receiver)
    for _ in range(20):
        await asyncio.sleep(0)
    assert transfer.sent == 1200
    assert len(await collect(receiver)) == 3600
    await sending


async def test_sending_is_not_done_before_the_receiver_has_all() -> None:
    relay = Relay()
    transfer = relay.open("op")
    sending = asyncio.create_task(relay.send(transfer.send, stream(b"abc")))
    receiver = relay.receive(transfer.receive)
    assert await anext(receiver) == b"abc"
    for _ in range(10):
        await asyncio.sleep(0)
    assert not sending.done() and not transfer.complete
    with pytest.raises(StopAsyncIteration):
        await anext(receiver)
    assert await sending == 3


async def test_tokens_are_used_once_and_for_their_side_only() -> None:
    relay = Relay()
    transfer, other = relay.open("op1"), relay.open("op2")
    tokens = {transfer.send, transfer.receive, other.send, other.receive}
    assert len(tokens) == 4 and all(len(token) >= 43 for token in tokens), "256 bits"
    for wrong in ("", "x", transfer.receive, transfer.send[:-1], transfer.send + "x", "é\udce9"):
        with pytest.raises(Unauthorized):
            relay.sender(wrong)
    with pytest.raises(Unauthorized):
        relay.receive(transfer.send)
    relay.sender(transfer.send)
    with pytest.raises(Unauthorized):
        relay.sender(transfer.send)
    relay.receive(transfer.receive)
    with pytest.raises(Unauthorized):
        relay.receive(transfer.receive)
    relay.sender(other.send)


async def test_a_sender_that_fails_never_looks_complete() -> None:
    relay = Relay()
    transfer = relay.open("op")

    async def broken() -> AsyncIterator[bytes]:
        yield b"abc"
        raise ConnectionResetError("peer went away")

    receiver = relay.receive(transfer.receive)
    sending = asyncio.create_task(relay.send(transfer.send, broken()))
    with pytest.raises(Cancelled, match="peer went away"):
        await collect(receiver)
    assert isinstance(await ending(sending), ConnectionResetError)
    assert not transfer.complete


async def test_a_sender_that_leaves_without_an_end_is_an_error() -> None:
    relay = Relay()
    transfer = relay.open("op")
    async with relay.sender(transfer.send) as sender:
        await sender.write(b"abc")
    with pytest.raises(Cancelled, match="did not end"):
        await collect(relay.receive(transfer.receive))


async def test_an_abort_from_a_handler_reaches_the_receiver() -> None:
    relay = Relay()
    transfer = relay.open("op")
    sender = relay.sender(transfer.send)
    await sender.write(b"abc")
    receiving = asyncio.create_task(collect(relay.receive(transfer.receive)))
    await asyncio.sleep(0)
    sender.abort("the connection was closed")
    assert "connection was closed" in str(await ending(receiving))
    with pytest.raises(Cancelled):
        await sender.finish()


async def test_a_receiver_that_leaves_stops_the_sender() -> None:
    relay = Relay(capacity=100)
    transfer = relay.open("op")
    sending = asyncio.create_task(relay.send(transfer.send, stream(*[bytes(60)] * 100)))
    with pytest.raises(RuntimeError, match="disk"):
        async with relay.receive(transfer.receive) as receiver:
            async for _ in receiver:
                raise RuntimeError("disk on fire")
    error = await ending(sending)
    assert isinstance(error, Cancelled) and "disk on fire" in error.text


async def test_a_receiver_that_leaves_after_the_last_byte_but_before_the_end() -> None:
    relay = Relay()
    transfer = relay.open("op")
    sending = asyncio.create_task(relay.send(transfer.send, stream(b"abc")))
    async with relay.receive(transfer.receive) as receiver:
        await anext(receiver)
    assert isinstance(await ending(sending), Cancelled)


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_a_side_that_is_cancelled_takes_the_other_with_it(side: str) -> None:
    relay = Relay(capacity=10)
    transfer = relay.open("op")
    sending = relay.sender(transfer.send)
    receiver = relay.receive(transfer.receive)
    if side == "sender":
        await sending.write(bytes(10))
        waiting: asyncio.Task[object] = asyncio.create_task(sending.write(bytes(10)))
    else:
        waiting = asyncio.create_task(collect(receiver))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    with pytest.raises(Cancelled):
        await (collect(receiver) if side == "sender" else sending.write(b"x"))


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_idle_for_too_long(side: str) -> None:
    relay = Relay(capacity=10, idle_timeout=0.05)
    transfer = relay.open("op")
    if side == "sender":
        work: asyncio.Task[object] = asyncio.create_task(relay.send(transfer.send, stream(bytes(10), bytes(10))))
    else:
        work = asyncio.create_task(collect(relay.receive(transfer.receive)))
    assert isinstance(await ending(work), DeadlinePassed)
    late = relay.receive(transfer.receive) if side == "sender" else relay.sender(transfer.send)
    with pytest.raises(DeadlinePassed):
        await (late.write(b"x") if not isinstance(late, Receiver) else collect(late))


async def test_a_new_attempt_replaces_the_old_one() -> None:
    relay = Relay(capacity=10)
    old = relay.open("op")
    sending = asyncio.create_task(relay.send(old.send, stream(bytes(10), bytes(10))))
    receiver = relay.receive(old.receive)
    await anext(receiver)
    await asyncio.sleep(0)
    new = relay.open("op")
    assert isinstance(await ending(sending), Stale)
    with pytest.raises(Stale):
        await collect(receiver)
    for token, use in ((old.send, relay.sender), (old.receive, relay.receive)):
        with pytest.raises(Unauthorized):
            use(token)
    again = asyncio.create_task(relay.send(new.send, stream(b"whole")))
    assert await collect(relay.receive(new.receive)) == b"whole"
    assert await again == 5


async def test_close_ends_both_sides_and_is_idempotent() -> None:
    relay = Relay()
    transfer = relay.open("op")
    receiving = asyncio.create_task(collect(relay.receive(transfer.receive)))
    await asyncio.sleep(0)
    relay.close("op")
    relay.close("op")
    assert isinstance(await ending(receiving), Cancelled)
    with pytest.raises(Unauthorized):
        relay.sender(transfer.send)


async def test_close_after_the_end_changes_nothing() -> None:
    relay = Relay()
    transfer = relay.open("op")
    receiver = relay.receive(transfer.receive)
    sending = asyncio.create_task(relay.send(transfer.send, stream(b"x")))
    assert await collect(receiver) == b"x"
    relay.close("op")
    assert await sending == 1


@pytest.mark.parametrize("seed", range(20))
async def test_however_it_ends_both_sides_end_the_same_way(seed: int) -> None:
    """Aborts at random moments: either both are content with the same bytes, or neither is."""
    chance = random.Random(seed)
    relay = Relay(capacity=100, idle_timeout=5)
    transfer = relay.open("op")
    chunks = [chance.randbytes(chance.randrange(1, 80)) for _ in range(30)]
    sending = asyncio.create_task(relay.send(transfer.send, stream(*chunks)))
    receiving = asyncio.create_task(collect(relay.receive(transfer.receive)))
    for _ in range(chance.randrange(80)):
        await asyncio.sleep(0)
    chance.choice((lambda: relay.close("op"), sending.cancel, receiving.cancel, lambda: relay.open("op")))()
    await asyncio.wait([sending, receiving], timeout=10)
    assert sending.done() and receiving.done()
    arrived = not receiving.cancelled() and receiving.exception() is None
    if not arrived:
        assert sending.cancelled() or isinstance(sending.exception(), VzfleetError)
    else:
        assert receiving.result() == b"".join(chunks)
