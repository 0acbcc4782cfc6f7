"""Two nodes' channels, joined directly on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agent.channel.channels import Channels
from agent.https import HttpsClient, unverified_context
from common import keys
from common.commands import Route
from tests.helpers.cluster import free_port


@dataclass
class JoinedNodes:
    """`source` connects to `target`, or to `through` in its place."""

    silence: float = 30.0
    through: int | None = None
    source_keys: keys.KeyPair = field(default_factory=keys.generate)
    target_keys: keys.KeyPair = field(default_factory=keys.generate)
    port: int = field(default_factory=free_port)
    client: HttpsClient = field(
        default_factory=lambda: HttpsClient("https://127.0.0.1:1", unverified_context(), timeout=5)
    )

    def __post_init__(self) -> None:
        self.source = self.make_source()
        self.target = self.make_target()

    def make_source(self) -> Channels:
        """As the sending node's agent has them."""
        return Channels(self.source_keys, self.client, 0, silence=self.silence)

    def make_target(self) -> Channels:
        """As the receiving node's agent has them."""
        return Channels(self.target_keys, self.client, self.port, silence=self.silence)

    def sending(self, **changed: Any) -> Route:
        """The route as the source sees it."""
        address = f"tcp://127.0.0.1:{self.through or self.port}"
        route = Route("op-1", 0, "target", self.target_keys.public, "the token", address=address)
        return msgspec.structs.replace(route, **changed)

    def receiving(self, **changed: Any) -> Route:
        """The route as the target sees it."""
        route = Route("op-1", 0, "source", self.source_keys.public, "the token", address="tcp://127.0.0.1:1")
        return msgspec.structs.replace(route, **changed)

    async def send(self, data: bytes, piece: int = 100_000, **changed: Any) -> bytes:
        """Send all of it; what the other end answered."""
        async with self.source.open(self.sending(**changed), True) as channel:
            for at in range(0, len(data), piece):
                await channel.write(data[at : at + piece])
            await channel.end()
            return await read_all(channel)

    async def receive(self, answer: bytes = b"whole", pause: float = 0.0, **changed: Any) -> bytes:
        """Take all there is, and answer."""
        async with self.target.open(self.receiving(**changed), False) as channel:
            data = await read_all(channel, pause)
            if answer:
                await channel.write(answer)
            await channel.end()
            return data


async def read_all(channel: Any, pause: float = 0.0) -> bytes:
    """All that comes until the end; `pause` seconds after each piece."""
    data = bytearray()
    while piece := await channel.read():
        data += piece
        if pause:
            await asyncio.sleep(pause)
    return bytes(data)


@asynccontextmanager
async def joined_nodes(silence: float = 30.0) -> AsyncIterator[JoinedNodes]:
    """Both, closed at the end."""
    nodes = JoinedNodes(silence)
    try:
        yield nodes
    finally:
        await nodes.source.close()
        await nodes.target.close()
        nodes.client.close()
