"""The ways between nodes: what the agent's `Channels` are to it, without sockets; cut where the network is cut.

Two ends that name the same token meet. One that comes anew, since its agent died, makes the other begin anew, too.
Some pairs of nodes cannot reach each other directly, only by the controller.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from agent.channel.base import Restarted
from common.commands import Route
from common.errors import Unavailable, Unreachable, VzfleetError
from tests.failure.simulation.loop import Process, this_process
from tests.failure.simulation.meetings import Meetings
from tests.failure.simulation.network import Network

DIALLING = 5.0
"""Seconds until a node gives up on one that it cannot reach."""
SILENCE = 40.0
"""Seconds without a sign of the other end after which it is given up."""


class End:
    """One end; see `agent.channel.endpoint.Endpoint`."""

    def __init__(self, process: Process, route: Route, network: Network) -> None:
        self.process = process
        self.host = str(process.owner.name)
        self.sent = 0
        self.received = 0
        self.failure: VzfleetError | None = None
        self.other: End | None = None
        self._route = route
        self._network = network
        self._inbox: deque[bytes] = deque()
        self._ended = False
        self._read_all = False
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Give bytes to the other end, as soon as something passes."""
        await self._until(self._passable)
        assert self.other is not None
        self.other._inbox.append(data)
        self.sent += len(data)
        self.other.wake()

    async def end(self) -> None:
        """No more comes; wait until the other end has read it all."""
        await self._until(self._passable)
        assert self.other is not None
        self.other._ended = True
        self.other.wake()
        other = self.other
        await self._until(lambda: other._read_all)

    async def read(self) -> bytes:
        """The next bytes; none at the other end's end."""
        await self._until(lambda: bool(self._inbox) or self._ended)
        if self._inbox:
            data = self._inbox.popleft()
            self.received += len(data)
            return data
        self._read_all = True
        if self.other is not None:
            self.other.wake()
        return b""

    async def met(self) -> None:
        """Wait for the other end."""
        await self._until(lambda: self.other is not None and self._passable())

    def fail(self, error: VzfleetError) -> None:
        """It is over."""
        self.failure = self.failure or error
        self.wake()

    def wake(self) -> None:
        """Something has changed."""
        self._changed.set()

    def _passable(self) -> bool:
        network = self._network
        hosts = {self.host, self._route.peer}
        return not hosts & network.cut.keys() and (self._route.relay is None or network.server is not None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        latest = loop.time() + SILENCE
        while True:
            self.process.check()
            if self.failure is not None:
                raise type(self.failure)(self.failure.text)
            if condition():
                return
            if loop.time() >= latest:
                raise Unavailable(f"node {self._route.peer} was silent for {SILENCE:g} s")
            self._changed.clear()
            try:
                async with asyncio.timeout(1.0):  # a partition that heals wakes nobody
                    await self._changed.wait()
            except TimeoutError:
                continue


class SimulatedChannels:
    """In place of `agent.channel.channels.Channels`."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        self._process = this_process()
        self._network: Network = self._process.owner.network

    @asynccontextmanager
    async def open(self, route: Route, sending: bool) -> AsyncIterator[End]:
        """One end of a channel."""
        meetings = self._network.meetings
        if route.address is not None and sending and meetings.apart(self._process.owner.name, route.peer):
            await asyncio.sleep(DIALLING)
            raise Unreachable(f"node {route.peer} cannot be reached at {route.address}")
        end = self._join(meetings, route, sending)
        try:
            await end.met()
            await asyncio.sleep(self._process.owner.time_of("transfer"))
            yield end
        except Restarted:
            raise
        except BaseException as error:
            if not self._process.dead and end.other is not None:
                end.other.fail(Unavailable(f"node {end.host} ended the transfer: {error or 'it was given up'}"))
            raise
        finally:
            if meetings.ends.get((route.token, sending)) is end:
                del meetings.ends[route.token, sending]

    def _join(self, meetings: Meetings, route: Route, sending: bool) -> End:
        end = End(self._process, route, self._network)
        before, there = meetings.ends.get((route.token, sending)), meetings.ends.get((route.token, not sending))
        if before is not None:
            before.fail(Restarted("this end has begun anew"))
        if there is not None and there.other is not None:
            there.fail(Restarted("the other end has begun anew"))
            del meetings.ends[route.token, not sending]
        elif there is not None:
            end.other, there.other = there, end
            there.wake()
        meetings.ends[route.token, sending] = end
        return end

    def leave(self) -> None:
        """Nothing is told in the end of a killed process anyway."""

    async def close(self) -> None:
        """There are no sockets."""
