"""Channels by the controller's relay: its real HTTPS server between two nodes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.channel import relay as agent_relay
from agent.channel.window import WINDOW
from agent.https import HttpsClient, pinned_context
from common.errors import Unavailable
from controller.relay import Relay, Way
from tests.helpers.cluster import Cluster, cluster
from tests.helpers.joined_nodes import JoinedNodes
from tests.helpers.tcp_proxy import tcp_proxy

DATA = random.Random(2).randbytes(6_000_000)
PATH = "/1.0/internal/transfers/" + "0" * 36


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, nodes=0) as made:
        yield made


def relay_of(fleet: Cluster) -> Relay:
    """The controller's relay."""
    return fleet.app.engine._resources.relay


def joined(fleet: Cluster, port: int | None = None, silence: float = 20.0) -> JoinedNodes:
    """Two nodes that know the controller, at `port` in its place."""
    ca = (fleet.settings.state / "tls" / "ca.crt").read_text()
    client = HttpsClient(f"https://127.0.0.1:{port or fleet.settings.port}", pinned_context(ca), timeout=10)
    return JoinedNodes(silence, client=client)


async def move(nodes: JoinedNodes, way: Way, data: bytes = DATA, rate: int | None = None) -> tuple[bytes, bytes]:
    """What the target got, and what the source was answered."""
    received, answer = await asyncio.gather(
        nodes.receive(relay=PATH, relay_put=way.target.put, relay_get=way.target.get),
        nodes.send(data, relay=PATH, relay_put=way.source.put, relay_get=way.source.get, rate=rate),
    )
    return received, answer


async def test_what_is_written_is_read(fleet: Cluster) -> None:
    nodes = joined(fleet)
    relay = relay_of(fleet)
    for number in range(3):
        way = relay.open(f"op-{number}")
        began = asyncio.get_running_loop().time()
        assert await move(nodes, way) == (DATA, b"whole")
        assert asyncio.get_running_loop().time() - began < 5
        relay.close(f"op-{number}")
    nodes.client.close()


async def test_cuts_are_not_seen(fleet: Cluster) -> None:
    relay = relay_of(fleet)
    way = relay.open("op")
    async with tcp_proxy(fleet.settings.port) as proxy:
        nodes = joined(fleet, proxy.port)
        moving = asyncio.ensure_future(move(nodes, way, rate=4_000_000))
        for _ in range(3):
            before = proxy.forwarded
            while proxy.forwarded < before + 700_000 and not moving.done():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            proxy.cut()
        assert await moving == (DATA, b"whole")
        assert proxy.accepted > 8
        nodes.client.close()


async def test_a_failure_is_told_to_the_other_end(fleet: Cluster) -> None:
    way = relay_of(fleet).open("op")
    nodes = joined(fleet)

    async def broken() -> None:
        route = nodes.receiving(relay=PATH, relay_put=way.target.put, relay_get=way.target.get)
        async with nodes.target.open(route, False) as channel:
            await channel.read()
            raise RuntimeError("the disk is full")

    receiving = asyncio.ensure_future(broken())
    with pytest.raises(Unavailable, match="target gave up: the disk is full"):
        await nodes.send(DATA, relay=PATH, relay_put=way.source.put, relay_get=way.source.get)
    with pytest.raises(RuntimeError):
        await receiving
    nodes.client.close()


async def test_a_way_that_is_not_open(fleet: Cluster) -> None:
    nodes = joined(fleet, silence=1.5)
    with pytest.raises(Unavailable, match=r"nothing was heard of target for 1.5 s \(.*401"):
        await nodes.send(b"x", relay=PATH, relay_put="a" * 64, relay_get="b" * 64)
    nodes.client.close()


async def test_the_controller_holds_little(fleet: Cluster) -> None:
    """A reader that does not read: what was sent stands in the windows, and no more than that at the relay."""
    way = relay_of(fleet).open("op")
    nodes = joined(fleet)
    written = 0

    async def source() -> None:
        nonlocal written
        route = nodes.sending(relay=PATH, relay_put=way.source.put, relay_get=way.source.get)
        async with nodes.source.open(route, True) as channel:
            while True:
                await channel.write(bytes(100_000))
                written += 100_000

    async def target() -> None:
        route = nodes.receiving(relay=PATH, relay_put=way.target.put, relay_get=way.target.get)
        async with nodes.target.open(route, False):
            await asyncio.sleep(1.0)

    sending = asyncio.ensure_future(source())
    await target()
    assert written <= WINDOW
    sending.cancel()
    await asyncio.wait([sending])
    nodes.client.close()


def test_the_relays_patience_is_longer_than_signs_of_life() -> None:
    assert agent_relay.PATIENCE > 30
