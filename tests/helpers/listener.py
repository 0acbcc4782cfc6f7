"""A client of /1.0/events."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.helpers.cluster import Cluster

PATIENCE = 20.0


class Listener:
    """A websocket of events: what came is in `frames`, each read by `next`."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self.connection = connection
        self.frames: list[dict[str, Any]] = []
        self.closed = False

    async def next(self) -> dict[str, Any] | None:
        """The next frame; None when the server has closed."""
        async with asyncio.timeout(PATIENCE):
            text = await self.connection.read_message()
        if text is None:
            self.closed = True
            self.connection.close()
            return None
        frame: dict[str, Any] = json.loads(text)
        self.frames.append(frame)
        return frame

    async def until(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The first frame that fulfils a condition."""
        while (frame := await self.next()) is not None:
            if condition(frame):
                return frame
        raise AssertionError(f"closed: {self.connection.close_code} {self.connection.close_reason}")

    async def to_end(self) -> list[dict[str, Any]]:
        """All that comes until the server closes."""
        while await self.next() is not None:
            pass
        return self.frames

    async def close(self) -> None:
        """Close, and wait until the server has, too; what still comes is not kept."""
        self.connection.close()
        async with asyncio.timeout(PATIENCE):
            while not self.closed:
                self.closed = await self.connection.read_message() is None

    @property
    def sequences(self) -> list[int]:
        """The numbers that came."""
        return [frame["sequence"] for frame in self.frames if "sequence" in frame]

    @property
    def actions(self) -> list[str]:
        """The actions of the lifecycle events that came."""
        return [frame["metadata"]["action"] for frame in self.frames if frame["type"] == "lifecycle"]


async def connect(fleet: Cluster, query: str = "", token: str | None = None, **headers: str) -> Listener:
    """Open the websocket. Raises tornado's HTTPClientError when it is refused."""
    context = ssl.create_default_context(cafile=str(fleet.settings.state / "tls" / "ca.crt"))
    request = HTTPRequest(
        f"wss://127.0.0.1:{fleet.settings.port}/1.0/events{query}",
        headers={"Authorization": f"Bearer {fleet.token if token is None else token}", **headers},
        ssl_options=context,
    )
    return Listener(await websocket_connect(request))


@asynccontextmanager
async def listening(fleet: Cluster, query: str = "", **options: str) -> AsyncIterator[Listener]:
    """A listener that is closed after the block."""
    listener = await connect(fleet, query, **options)
    try:
        yield listener
    finally:
        await listener.close()


def ended(operation: str) -> Callable[[dict[str, Any]], bool]:
    """A condition: the operation with this id has ended."""

    def is_end(frame: dict[str, Any]) -> bool:
        view = frame["metadata"]
        return frame["type"] == "operation" and view["id"] == operation and view["status_code"] >= 200

    return is_end
