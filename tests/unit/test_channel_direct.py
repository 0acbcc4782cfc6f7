"""Channels from node to node: real CURVE sockets on loopback, and a TCP proxy that cuts, stalls and delays."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from agent.channel import direct, endpoint, listener
from agent.channel.base import Restarted
from agent.channel.frames import Frame, Greeting, Kind, proof_of
from agent.channel.window import FRAME, WINDOW
from common import keys
from common.errors import InvalidRequest, Unavailable, Unreachable
from tests.helpers.joined_nodes import JoinedNodes, joined_nodes, read_all
from tests.helpers.tcp_proxy import TcpProxy, tcp_proxy

DATA = random.Random(1).randbytes(9_000_000)


@pytest.fixture
async def nodes() -> AsyncIterator[JoinedNodes]:
    async with joined_nodes() as made:
        yield made


@pytest.fixture
async def proxy(nodes: JoinedNodes) -> AsyncIterator[TcpProxy]:
    async with tcp_proxy(nodes.port) as made:
        nodes.through = made.port
        yield made


async def until_it_listens(port: int) -> None:
    async with asyncio.timeout(5):
        while not await listens(port):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_it_is_closed(port: int) -> None:
    async with asyncio.timeout(5):
        while await listens(port):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.transport.abort()
    return True


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------- as it should be


async def test_what_is_written_is_read_both_ways(nodes: JoinedNodes) -> None:
    received, answer = await asyncio.gather(nodes.receive(), nodes.send(DATA))
    assert received == DATA
    assert answer == b"whole"


async def test_both_write_at_once_more_than_a_window(nodes: JoinedNodes) -> None:
    there, back = DATA, DATA[::-1]

    async def end(channels: Any, route: Any, sending: bool, data: bytes) -> bytes:
        async with channels.open(route, sending) as channel:
            reading = asyncio.ensure_future(read_all(channel))
            await channel.write(data)
            await channel.end()
            return await reading

    got = await asyncio.gather(
        end(nodes.source, nodes.sending(), True, there), end(nodes.target, nodes.receiving(), False, back)
    )
    assert got == [back, there]


async def test_one_direction_ends_and_the_other_goes_on(nodes: JoinedNodes) -> None:
    async def source() -> bytes:
        async with nodes.source.open(nodes.sending(), True) as channel:
            await channel.end()
            return await read_all(channel)

    async def target() -> None:
        async with nodes.target.open(nodes.receiving(), False) as channel:
            assert await channel.read() == b""
            assert await channel.read() == b""
            for _ in range(5):
                await channel.write(DATA[:2_000_000])
            await channel.end()

    answer, _ = await asyncio.gather(source(), target())
    assert answer == DATA[:2_000_000] * 5


async def test_two_transfers_at_once_on_one_port(nodes: JoinedNodes) -> None:
    other = keys.generate()
    second = JoinedNodes(30, source_keys=other, target_keys=nodes.target_keys, port=nodes.port)
    second.target = nodes.target
    try:
        got = await asyncio.gather(
            nodes.receive(),
            nodes.receive(transfer="op-2", token="another"),
            nodes.receive(transfer="op-3", peer_key=other.public),
            nodes.send(DATA),
            nodes.send(DATA[::-1], transfer="op-2", token="another"),
            second.send(DATA[:1000], transfer="op-3"),
        )
    finally:
        await second.source.close()
        second.client.close()
    assert got[:3] == [DATA, DATA[::-1], DATA[:1000]]


async def test_the_port_is_open_only_while_somebody_is_expected(nodes: JoinedNodes) -> None:
    assert not await listens(nodes.port)
    receiving = asyncio.ensure_future(nodes.receive())
    await until_it_listens(nodes.port)
    await nodes.send(b"x")
    await receiving
    await until_it_is_closed(nodes.port)
    got, _ = await asyncio.gather(nodes.receive(round=1), nodes.send(b"again", round=1))
    assert got == b"again"


async def test_nothing_of_a_transfer_stays_in_memory(nodes: JoinedNodes) -> None:
    await asyncio.gather(nodes.receive(), nodes.send(DATA))
    tracemalloc.start()
    try:
        for number in range(5):
            await asyncio.gather(nodes.receive(round=number), nodes.send(DATA, round=number))
        await asyncio.sleep(0)  # the loop holds the last result for one more turn
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


async def test_the_rate_is_kept(nodes: JoinedNodes) -> None:
    begun = asyncio.get_running_loop().time()
    await asyncio.gather(nodes.receive(rate=1_000_000), nodes.send(DATA[:1_000_000], rate=1_000_000))
    assert 0.8 < asyncio.get_running_loop().time() - begun < 3


# ---------------------------------------------------------------- the way


@pytest.mark.parametrize("seed", range(3))
async def test_cuts_are_not_seen(nodes: JoinedNodes, proxy: TcpProxy, seed: int) -> None:
    chance = random.Random(seed)
    moving = asyncio.gather(nodes.receive(), nodes.send(DATA * 3))
    cuts = 0
    while not moving.done() and cuts < 12:
        before = proxy.forwarded
        await until(lambda b=before: moving.done() or proxy.forwarded > b + chance.randrange(3_000_000))
        proxy.cut()
        cuts += 1
    received, answer = await moving
    assert received == DATA * 3
    assert answer == b"whole"
    assert proxy.accepted >= 4


async def test_a_way_that_is_gone_for_a_while(nodes: JoinedNodes, proxy: TcpProxy) -> None:
    moving = asyncio.gather(nodes.receive(), nodes.send(DATA))
    await until(lambda: proxy.forwarded > 1_000_000)
    proxy.refusing = True
    proxy.cut()
    await until(lambda: proxy.accepted > 3)
    assert not moving.done()
    proxy.refusing = False
    assert (await moving)[0] == DATA


async def test_a_way_that_stalls(nodes: JoinedNodes, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {zmq.HEARTBEAT_IVL: 100, zmq.HEARTBEAT_TIMEOUT: 300, zmq.HEARTBEAT_TTL: 300, zmq.HANDSHAKE_IVL: 300}
    monkeypatch.setattr(direct, "_COMMON", direct._COMMON | fast)
    moving = asyncio.gather(nodes.receive(), nodes.send(DATA))
    await until(lambda: proxy.forwarded > 1_000_000)
    proxy.stall()
    await until(lambda: proxy.accepted > 2)
    proxy.go_on()
    assert (await moving)[0] == DATA


async def test_a_slow_way(nodes: JoinedNodes, proxy: TcpProxy) -> None:
    proxy.delay = 0.002
    received, _ = await asyncio.gather(nodes.receive(), nodes.send(DATA[:2_000_000]))
    assert received == DATA[:2_000_000]


async def test_silence_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with joined_nodes(silence=1.0) as nodes, tcp_proxy(nodes.port) as proxy:
        nodes.through = proxy.port
        moving = [asyncio.ensure_future(work) for work in (nodes.receive(), nodes.send(DATA * 4))]
        await until(lambda: proxy.forwarded > 1_000_000)
        proxy.stall()
        for end in moving:
            with pytest.raises(Unavailable, match=r"nothing was heard of (source|target) for 1 s"):
                await end


async def test_an_end_that_says_nothing_but_lives_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "ALIVE_EVERY", 0.1)
    async with joined_nodes(silence=0.6) as nodes:

        async def source() -> None:
            async with nodes.source.open(nodes.sending(), True) as channel:
                await asyncio.sleep(1.5)
                await channel.write(b"late")
                await channel.end()
                await channel.read()

        received, _ = await asyncio.gather(nodes.receive(b""), source())
        assert received == b"late"


# ---------------------------------------------------------------- who is let in


async def test_nobody_listens(nodes: JoinedNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "REACH_WITHIN", 0.5)
    with pytest.raises(Unreachable, match=r"target cannot be reached at tcp://127\.0\.0\.1"):
        await nodes.send(b"x")


async def test_something_else_listens_there(nodes: JoinedNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "REACH_WITHIN", 0.5)
    with socket.create_server(("127.0.0.1", nodes.port)), pytest.raises(Unreachable):
        await nodes.send(b"x")


async def test_a_port_that_is_taken(nodes: JoinedNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "BIND_WITHIN", 0.2)
    with (
        socket.create_server(("0.0.0.0", nodes.port)),
        pytest.raises(Unreachable, match=rf"data port {nodes.port} cannot be used .*`data_port`"),
    ):
        await nodes.receive()


@pytest.mark.parametrize(
    "changed", [{"token": "another"}, {"round": 1}, {"transfer": "op-2"}, {"peer_key": keys.generate().public}]
)
async def test_who_is_not_expected_is_not_let_in(
    nodes: JoinedNodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: dict[str, Any]
) -> None:
    monkeypatch.setattr(direct, "REACH_WITHIN", 0.5)
    monkeypatch.setattr(direct, "EXPECT_WITHIN", 1.0)
    receiving = asyncio.ensure_future(nodes.receive(**changed))
    with pytest.raises(Unreachable):
        await nodes.send(b"x")
    assert not receiving.done()
    receiving.cancel()
    await asyncio.wait([receiving])
    told = " ".join(record.message for record in caplog.records if record.levelno >= logging.WARNING)
    assert "not let in" in told or "refused" in told


async def test_the_sender_knows_whom_it_speaks_to(nodes: JoinedNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "REACH_WITHIN", 1.0)
    receiving = asyncio.ensure_future(nodes.receive())
    with pytest.raises(Unreachable):
        await nodes.send(b"x", peer_key=keys.generate().public)
    receiving.cancel()
    await asyncio.wait([receiving])


async def test_another_expected_node_cannot_take_anothers_place(nodes: JoinedNodes) -> None:
    """Its key is let in for its own transfer; with the token of the other's it still is not the one."""
    other = keys.generate()
    thief = JoinedNodes(30, source_keys=other, target_keys=nodes.target_keys, port=nodes.port)
    own = asyncio.ensure_future(nodes.receive(transfer="op-2", peer_key=other.public))
    receiving = asyncio.ensure_future(nodes.receive())
    stealing = asyncio.ensure_future(thief.send(b"stolen"))
    await asyncio.sleep(0.5)
    assert not stealing.done() and not receiving.done()
    await nodes.send(b"rightful")
    assert await receiving == b"rightful"
    for task in (stealing, own):
        task.cancel()
    await asyncio.wait([stealing, own])
    await thief.source.close()
    thief.client.close()


async def test_an_address_that_is_none(nodes: JoinedNodes) -> None:
    with pytest.raises(InvalidRequest):
        await nodes.send(b"x", address="tcp://:::")


async def test_a_sender_that_comes_first_is_let_in_when_it_is_expected(nodes: JoinedNodes) -> None:
    """The port is open for another transfer: the refusal says that the node is there."""
    other = keys.generate()
    waiting = asyncio.ensure_future(nodes.receive(transfer="op-9", peer_key=other.public))
    sending = asyncio.ensure_future(nodes.send(b"early"))
    await asyncio.sleep(1.0)
    assert not sending.done()
    assert await nodes.receive() == b"early"
    await sending
    waiting.cancel()
    await asyncio.wait([waiting])


# ---------------------------------------------------------------- a hostile peer


class Peer:
    """Somebody with the source's key who says what he likes."""

    def __init__(self, nodes: JoinedNodes) -> None:
        self.nodes = nodes
        self.context = zmq.asyncio.Context()
        self.socket: zmq.asyncio.Socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.curve_publickey = nodes.source_keys.public.encode()
        self.socket.curve_secretkey = nodes.source_keys.secret.encode()
        self.socket.curve_serverkey = nodes.target_keys.public.encode()

    async def __aenter__(self) -> Peer:
        await until_it_listens(self.nodes.port)
        self.socket.connect(f"tcp://127.0.0.1:{self.nodes.port}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    async def greet(self, nonce: bytes = b"n" * 16, known: bytes = bytes(16)) -> Frame:
        greeting = Greeting(nonce, known, proof_of(self.nodes.sending()))
        await self.say(Frame(Kind.HELLO, 0, 0, greeting.encode()))
        async with asyncio.timeout(5):
            header, _payload = await self.socket.recv_multipart()
        assert header[0] == Kind.HELLO
        return Frame(Kind.HELLO, 0, 0)

    async def say(self, frame: Frame) -> None:
        await self.socket.send_multipart([frame.header, frame.payload] if frame.payload else [frame.header])


GARBAGE: list[list[bytes]] = [
    [b""],
    [b"x"],
    [b"x" * 21],
    [b"\x02" + bytes(20), b"payload"],
    [b"\x63" + bytes(20)],
    [Frame(Kind.DATA, 0, 0, b"x").header],
    [Frame(Kind.DATA, 0, 0, b"x").header, b"xy"],
    [Frame(Kind.DATA, 0, 0, b"x").header, b"x", b"y"],
    [Frame(Kind.DATA, 0, 0, b"x" * (FRAME + 1)).header, b"x" * (FRAME + 1)],
    [Frame(Kind.DATA, 5, 0, b"x").header, b"x"],
    [Frame(Kind.DATA, 2**63, 0, b"x").header, b"x"],
    [Frame(Kind.DATA, 0, 77, b"x").header, b"x"],
    [Frame(Kind.ALIVE, 0, 2**64 - 1).header],
    [Frame(Kind.END, 9, 0).header],
    [Frame(Kind.HELLO, 0, 0, b"x" * 81).header, b"x" * 81],
    [Frame(Kind.ABORT, 0, 0, b"x" * 3000).header, b"x" * 3000],
]


@pytest.mark.parametrize("parts", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_of_the_expected_peer_ends_its_transfer_alone(
    nodes: JoinedNodes, parts: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    receiving = asyncio.ensure_future(nodes.receive())
    other = asyncio.ensure_future(nodes.receive(transfer="op-2"))
    async with Peer(nodes) as peer:
        await peer.greet()
        await peer.socket.send_multipart(parts)
        if sum(map(len, parts)) <= FRAME:
            with pytest.raises(Unavailable, match=r"malformed|protocol"):
                await receiving
        else:
            # libzmq hangs up by itself.
            await asyncio.sleep(0.3)
            receiving.cancel()
            await asyncio.wait([receiving])
    assert not other.done()
    await nodes.send(b"still here", transfer="op-2")
    assert await other == b"still here"
    assert not [record for record in caplog.records if record.exc_info], "no tracebacks"


@pytest.mark.parametrize("parts", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_before_a_greeting_harms_nobody(nodes: JoinedNodes, parts: list[bytes]) -> None:
    receiving = asyncio.ensure_future(nodes.receive())
    async with Peer(nodes) as peer:
        for _ in range(5):
            await peer.socket.send_multipart(parts)
        await asyncio.sleep(0.1)
    await nodes.send(b"good")
    assert await receiving == b"good"


async def test_a_peer_that_ignores_the_window_fills_no_memory(nodes: JoinedNodes) -> None:
    async def never_reads() -> None:
        async with nodes.target.open(nodes.receiving(), False) as channel:
            await asyncio.Event().wait()
            await channel.read()

    receiving = asyncio.ensure_future(never_reads())
    async with Peer(nodes) as peer:
        await peer.greet()
        tracemalloc.start()
        try:
            offset = 0
            for _ in range(3 * WINDOW // FRAME):
                await peer.say(Frame(Kind.DATA, offset, 0, bytes(FRAME)))
                offset += FRAME
            await until(lambda: nodes.target._listener._expected[0].endpoint.failure is not None)
            assert tracemalloc.get_traced_memory()[0] < 2 * WINDOW
        finally:
            tracemalloc.stop()
    failure = nodes.target._listener._expected[0].endpoint.failure
    assert failure is not None and "only 0 was read" in failure.text
    receiving.cancel()
    await asyncio.wait([receiving])


async def test_a_flood_of_greetings_leaves_one_connection(nodes: JoinedNodes) -> None:
    receiving = asyncio.ensure_future(nodes.receive())
    for _ in range(20):
        async with Peer(nodes) as peer:
            await peer.greet()
    assert len(nodes.target._listener._callers) == 1
    receiving.cancel()
    await asyncio.wait([receiving])
    assert not nodes.target._listener._callers


# ---------------------------------------------------------------- ends that fail, and begin anew


async def test_a_slow_reader_holds_the_writer_back(nodes: JoinedNodes) -> None:
    async def source() -> int:
        async with nodes.source.open(nodes.sending(), True) as channel:
            written = 0
            try:
                async with asyncio.timeout(0.5):
                    while True:
                        await channel.write(bytes(FRAME))
                        written += FRAME
            except TimeoutError:
                return written

    async def target() -> None:
        async with nodes.target.open(nodes.receiving(), False):
            await asyncio.sleep(1.0)

    written, _ = await asyncio.gather(source(), target(), return_exceptions=True)
    assert written == WINDOW


@pytest.mark.parametrize("failing", ["source", "target"])
async def test_an_end_that_fails_takes_the_other_with_it_and_says_why(nodes: JoinedNodes, failing: str) -> None:
    class Broken(Exception):
        pass

    async def end(channels: Any, route: Any, sending: bool) -> None:
        async with channels.open(route, sending) as channel:
            if sending == (failing == "source"):
                await asyncio.sleep(0.1)
                raise Broken("the disk\nis full")
            while True:
                if sending:
                    await channel.write(bytes(FRAME))
                else:
                    await channel.read()

    source = asyncio.ensure_future(end(nodes.source, nodes.sending(), True))
    target = asyncio.ensure_future(end(nodes.target, nodes.receiving(), False))
    first, other = (source, target) if failing == "source" else (target, source)
    with pytest.raises(Broken):
        await first
    async with asyncio.timeout(2):
        with pytest.raises(Unavailable, match=rf"{failing} gave up: the disk is full"):
            await other


async def test_an_end_that_is_cancelled_says_so(nodes: JoinedNodes) -> None:
    receiving = asyncio.ensure_future(nodes.receive())
    sending = asyncio.ensure_future(nodes.send(DATA, rate=2_000_000))
    await asyncio.sleep(0.3)
    sending.cancel()
    async with asyncio.timeout(3):
        with pytest.raises(Unavailable, match="source gave up: the command was given up"):
            await receiving
        await asyncio.wait([sending])
    assert sending.cancelled()


@pytest.mark.parametrize("anew", ["source", "target", "both"])
async def test_an_end_that_begins_anew_has_the_other_begin_anew(nodes: JoinedNodes, anew: str) -> None:
    """Its agent was killed: nobody says anything, and then there is another run of the same end."""
    ends: dict[str, asyncio.Task[bytes]] = {}
    restarts = {"source": 0, "target": 0}

    async def again(name: str) -> bytes:
        while True:
            try:
                if name == "source":
                    return await nodes.send(DATA, rate=None if restarts["source"] else 4_000_000)
                return await nodes.receive()
            except Restarted:
                restarts[name] += 1

    for name in ("source", "target"):
        ends[name] = asyncio.ensure_future(again(name))
    await asyncio.sleep(0.7)
    for name in ("source", "target"):
        if anew in (name, "both"):
            channels = nodes.source if name == "source" else nodes.target
            channels.leave()
            ends[name].cancel()
            await asyncio.wait([ends[name]])
            await channels.close()
            restarts[name] += 1
    if anew in ("source", "both"):
        nodes.source = nodes.make_source()
        ends["source"] = asyncio.ensure_future(again("source"))
    if anew in ("target", "both"):
        nodes.target = nodes.make_target()
        ends["target"] = asyncio.ensure_future(again("target"))
    async with asyncio.timeout(15):
        assert await ends["target"] == DATA
        assert await ends["source"] == b"whole"
    assert max(restarts.values()) <= 2


async def test_the_last_word_may_be_lost(
    nodes: JoinedNodes, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sender has read the end and is gone; the receiver has everything and does not wait for ever."""
    monkeypatch.setattr(endpoint, "LAST_WORD", 0.3)
    monkeypatch.setattr(endpoint, "ALIVE_EVERY", 0.2)

    async def source() -> None:
        async with nodes.source.open(nodes.sending(), True) as channel:
            await channel.write(b"all")
            await channel.end()
            proxy.refusing = True
            proxy.cut()
            nodes.source.leave()

    received, _ = await asyncio.gather(nodes.receive(b""), source())
    assert received == b"all"
