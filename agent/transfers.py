"""A container's data to and from another node: the command, the channel and the driver put together."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import cast

from agent.channel.base import Restarted
from agent.channel.channels import Channels
from agent.channel.endpoint import Endpoint
from agent.drivers.base import Driver, Format, Incoming, Outgoing
from agent.progress import ProgressReporter
from common.commands import ReceiveContainer, Route, SendContainer
from common.errors import Unavailable

log = logging.getLogger(__name__)
MOST_RESTARTS = 20
"""How often a round is begun anew because the other end was."""


class Transfers:
    """Carries out the rounds of transfers. Both ends of a round succeed only when both have read the other's end."""

    def __init__(self, driver: Driver, channels: Channels) -> None:
        self._driver = driver
        self._channels = channels

    async def send(self, command: SendContainer, report: ProgressReporter) -> int:
        """Send one round of a container's data; how many bytes went over. Raises Unreachable, Unavailable."""
        what = Outgoing(
            command.container,
            command.route.transfer,
            command.route.round,
            cast(Format, command.format),
            command.last,
            command.moving,
            command.snapshot,
            command.with_snapshots,
        )

        async def run(channel: Endpoint) -> int:
            await self._driver.send(what, channel, report.transferred)
            await channel.end()
            await _drain(channel)
            return channel.sent

        return await self._round(command.route, True, run)

    async def receive(self, command: ReceiveContainer, _report: ProgressReporter) -> int:
        """Take one round; how many bytes came. The sender tells how far it is. Raises as `send`."""
        what = Incoming(
            command.spec,
            command.route.transfer,
            command.route.round,
            cast(Format, command.format),
            command.last,
            command.refresh,
        )

        async def run(channel: Endpoint) -> int:
            await self._driver.receive(what, channel)
            await _drain(channel)
            await channel.end()
            return channel.received

        return await self._round(command.route, False, run)

    async def _round(self, route: Route, sending: bool, run: Callable[[Endpoint], Awaitable[int]]) -> int:
        for _ in range(MOST_RESTARTS + 1):
            try:
                async with self._channels.open(route, sending) as channel:
                    return await _cause_of(channel, run)
            except Restarted:
                log.info("a round of a transfer begins anew", extra={"transfer": route.transfer, "peer": route.peer})
        raise Unavailable(f"{route.peer} has begun anew {MOST_RESTARTS} times")


async def _cause_of(channel: Endpoint, run: Callable[[Endpoint], Awaitable[int]]) -> int:
    """What `run` returns. When it failed after its channel had, that is why."""
    try:
        return await run(channel)
    except Exception as error:
        failure = channel.failure
        if failure is None or isinstance(error, Restarted):
            raise
        log.info("a transfer failed with its channel", extra={"error": str(error)})
        raise type(failure)(failure.text) from error


async def _drain(channel: Endpoint) -> None:
    """Read to the other end's end: what comes after a driver has all that it needs has no meaning."""
    while await channel.read():
        continue
