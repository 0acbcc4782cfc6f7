"""A container's data from one node to another, through the controller's relay."""

from __future__ import annotations

import asyncio

from common.commands import ReceiveContainer, SendContainer
from common.reports import ContainerSpec
from controller.operations.kinds import Context

END_TIME = 30.0
"""Seconds that one end has to say how it ended when the other has failed; its node may be out of reach."""


async def transfer(
    context: Context,
    source_node: str,
    source: ContainerSpec,
    target_node: str,
    target: ContainerSpec,
    *,
    snapshot: str | None,
    with_snapshots: bool,
) -> None:
    """Make `target` on its node from what `source` has on its own. Raises what went wrong first."""
    relay = context.resources.relay
    tokens = relay.open(context.operation.id)
    path = f"/1.0/internal/transfers/{context.operation.id}"
    send = SendContainer(source.id, path, tokens.send, snapshot, with_snapshots)
    receive = ReceiveContainer(target, path, tokens.receive)
    ends = [
        asyncio.ensure_future(context.command(source_node, send, source.generation, part="-send")),
        asyncio.ensure_future(context.command(target_node, receive, target.generation, part="-receive")),
    ]
    try:
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
        # The other end hears at once when one has failed, and says how it ended.
        relay.close(context.operation.id)
        await asyncio.wait(ends, timeout=END_TIME)
    finally:
        relay.close(context.operation.id)
        for end in ends:
            end.cancel()
    for end in (*done, *ends):
        end.result()
