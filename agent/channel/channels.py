"""Opens channels by their routes: directly from node to node, or by the controller's relay."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import zmq.asyncio

from agent.channel.base import Restarted
from agent.channel.direct import Dialler
from agent.channel.endpoint import SILENCE, Endpoint
from agent.channel.frames import proof_of
from agent.channel.listener import Listener
from agent.channel.relay import RelayCarrier
from agent.https import HttpsClient
from common.commands import Route
from common.errors import Internal
from common.keys import KeyPair

log = logging.getLogger(__name__)
LAST_WORDS = 1.0
"""Seconds in which the other end is told how it ended here."""
RELAY_LEAVES_WITHIN = 4.0
"""Seconds in which they are delivered by the relay."""


class Channels:
    """All channels of a node. `port` is its data port, `silence` how many seconds the other end may be silent."""

    def __init__(self, keys: KeyPair, client: HttpsClient, port: int, *, silence: float = SILENCE) -> None:
        self._keys = keys
        self._client = client
        self._silence = silence
        self._context: zmq.asyncio.Context | None = None
        self._listener = Listener(self._open_context, keys, port)
        self._leaving = False

    @asynccontextmanager
    async def open(self, route: Route, sending: bool) -> AsyncIterator[Endpoint]:
        """One end of a channel, once both ends have greeted each other. What ends the block by an error ends the other
        end, too, and tells it why.

        Raises Unreachable, Unavailable, Restarted, InvalidRequest.
        """
        endpoint = Endpoint(
            route.peer, proof_of(route), sending=sending, rate=route.rate if sending else None, silence=self._silence
        )
        async with self._carrier(route, endpoint, sending):
            try:
                await endpoint.opened()
                yield endpoint
            except Restarted:
                raise
            except BaseException as error:
                # An agent that is stopped does the command again when it is back, and the other end waits for that.
                if not self._leaving:
                    endpoint.abort(str(error)[:1000] or "the command was given up")
                raise
            finally:
                if not self._leaving:
                    await endpoint.flush(LAST_WORDS)

    def leave(self) -> None:
        """The agent stops: what is cancelled from now on is not given up, just interrupted."""
        self._leaving = True

    async def close(self) -> None:
        """Give all back, what is still open too; waits a second at most for last words on their way."""
        await self._listener.close()
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def _carrier(self, route: Route, endpoint: Endpoint, sending: bool) -> AbstractAsyncContextManager[object]:
        if route.relay is not None:
            return self._relayed(endpoint, RelayCarrier(self._client, endpoint, route))
        if sending:
            dialler = Dialler(self._open_context(), self._keys, endpoint, route.address or "", route.peer_key)
            return _running(dialler.run(), endpoint)
        return self._listener.expect(endpoint, route.peer_key)

    def _open_context(self) -> zmq.asyncio.Context:
        if self._context is None:
            self._context = zmq.asyncio.Context()
        return self._context

    @asynccontextmanager
    async def _relayed(self, endpoint: Endpoint, carrier: RelayCarrier) -> AsyncIterator[None]:
        async with _running(carrier.run(), endpoint) as task:
            try:
                yield
            finally:
                if not self._leaving:
                    carrier.leave()
                    await asyncio.wait([task], timeout=RELAY_LEAVES_WITHIN)


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None], endpoint: Endpoint) -> AsyncIterator[asyncio.Task[None]]:
    """Run a carrier beside the block; should it meet a fault, its endpoint has failed."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("a carrier of a channel met a fault", exc_info=task.exception())
            endpoint.fail(Internal("the agent met a fault; its log tells more"))

    task = asyncio.ensure_future(work)
    task.add_done_callback(ended)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
