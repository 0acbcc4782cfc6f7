"""The window of a channel: whatever is lost, repeated, reordered or cut, what is read is what was written."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.channel import window
from agent.channel.window import FRAME, WINDOW, Inbound, Outbound, Violation

Frame = tuple[int, bytes]


def drain(inbound: Inbound, most: int = 10**9) -> bytes:
    """What can be read now, in at most so many pieces."""
    read = bytearray()
    for _ in range(most):
        data = inbound.read()
        if not data:
            break
        read += data
    return bytes(read)


def write(out: Outbound, data: bytes, at: int, size: int) -> int:
    """Write the next bytes as far as there is room, or the end; what is written then."""
    if at == len(data):
        out.finish()
        return at
    piece = data[at : at + min(size, FRAME, out.room)]
    out.append(piece)
    return at + len(piece)


def run(seed: int, data: bytes, sizes: list[int], faults: float) -> None:
    """Send `data` over a way that misbehaves at this rate, until it is there."""
    chance = random.Random(seed)
    out, inbound = Outbound(), Inbound()
    wire: deque[Frame] = deque()
    acks: list[int] = []
    arrived = bytearray()
    at = 0
    for _ in range(200_000):
        at = write(out, data, at, chance.choice(sizes))
        frame = out.take(chance.choice(sizes))
        if frame is not None and chance.random() >= faults:
            wire.append(frame)
        if wire and chance.random() < faults:
            wire.append(chance.choice(wire))
        if len(wire) > 1 and chance.random() < faults:
            chance.shuffle(wire)
        missing = bool(wire) and not inbound.take(*wire.popleft())
        arrived += drain(inbound, chance.choice((0, 1, 5)))
        acks.append(inbound.consumed)
        if chance.random() < 0.5:
            out.acknowledge(chance.choice(acks[-5:]))
        if missing or chance.random() < faults / 10 or (not wire and not out.has_next()):
            # The connection is cut: what is on the way is lost, and the other end says what it has.
            wire.clear()
            out.acknowledge(inbound.consumed)
            out.rewind(inbound.received)
        if out.done:
            break
        if inbound.received > len(data):
            arrived += inbound.read() or b""
    assert out.done and inbound.over
    assert bytes(arrived) == data


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    data=st.binary(max_size=2000),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    faults=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_everything_arrives_once_and_in_order(seed: int, data: bytes, sizes: list[int], faults: float) -> None:
    run(seed, data, sizes, faults)


@pytest.mark.parametrize("seed", range(6))
def test_more_than_a_window(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "WINDOW", 5000)
    monkeypatch.setattr(window, "FRAME", 1000)
    run(seed, random.Random(seed).randbytes(60_000), [1, 100, 700, 1000], 0.1)


def test_no_more_than_a_window_is_under_way() -> None:
    out = Outbound()
    for _ in range(WINDOW // FRAME):
        out.append(bytes(FRAME))
    assert out.room == 0
    with pytest.raises(ValueError, match="no room"):
        out.append(b"x")
    while out.take():
        pass
    out.acknowledge(1000)
    assert out.room == 1000


def test_tiny_pieces_cost_no_more_than_their_bytes() -> None:
    out, inbound = Outbound(), Inbound()
    for offset in range(300_000):
        out.append(b"x")
        inbound.take(offset, b"y")
    assert len(out._kept._chunks) <= 3
    assert len(inbound._waiting._chunks) <= 3
    assert out.take() == (0, b"x" * FRAME)
    assert drain(inbound) == b"y" * 300_000


def test_a_sender_that_ignores_the_window() -> None:
    inbound = Inbound()
    offset = 0
    while offset < WINDOW:
        assert inbound.take(offset, bytes(FRAME))
        offset += FRAME
    with pytest.raises(Violation, match="only 0 was read"):
        inbound.take(offset, b"x")
    with pytest.raises(Violation, match="only 0 was read"):
        inbound.take(2**63, b"x")
    assert inbound.take(offset, b""), "the end may come"
    assert inbound.received == WINDOW + 1


def test_what_comes_after_the_end() -> None:
    inbound = Inbound()
    inbound.take(0, b"abc")
    inbound.take(3, b"")
    assert inbound.take(3, b""), "again is nothing new"
    assert inbound.take(1, b"bc")
    for offset, data in ((3, b"d"), (0, b"abcd"), (2, b""), (4, b"")):
        with pytest.raises(Violation):
            inbound.take(offset, data)
    assert [inbound.read(), inbound.read(), inbound.read()] == [b"abc", b"", b""]
    assert inbound.over


def test_an_end_before_what_was_sent() -> None:
    inbound = Inbound()
    inbound.take(0, b"abc")
    with pytest.raises(Violation, match="it ended at 2"):
        inbound.take(2, b"")


def test_acknowledgements_that_cannot_be() -> None:
    out = Outbound()
    out.append(b"abcdef")
    with pytest.raises(Violation, match="only 0 was sent"):
        out.acknowledge(1)
    assert out.take(4) == (0, b"abcd")
    out.acknowledge(3)
    out.acknowledge(1)
    assert out.acknowledged == 3
    for received in (2, 5):
        with pytest.raises(Violation):
            out.rewind(received)
    out.rewind(3)
    assert out.take() == (3, b"def")


def test_each_direction_ends_once() -> None:
    out = Outbound()
    out.finish()
    assert out.take() == (0, b"")
    assert not out.done
    out.acknowledge(1)
    assert out.done and not out.has_next()
    with pytest.raises(ValueError, match="was ended"):
        out.append(b"x")
