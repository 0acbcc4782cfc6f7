"""A container's data from one node to another, through the controller's relay."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from common.commands import ReceiveContainer, SendContainer
from common.errors import Cancelled, Unauthorized, Unavailable
from common.messages import Outcome
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
    """Make `target` on its node from what `source` has on its own. Raises why one end failed."""
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
        await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
        # The other end hears at once when one has failed, and says how it ended.
        relay.close(context.operation.id)
        await asyncio.wait(ends, timeout=END_TIME)
    finally:
        relay.close(context.operation.id)
        for end in ends:
            end.cancel()
    raise_cause(ends)


def raise_cause(ends: Sequence[asyncio.Future[Outcome]]) -> None:
    """Raise the failure of an end, if there is one: a cause before the broken connection that it led to."""
    errors = [end.exception() for end in ends if end.done() and not end.cancelled()]
    failures = sorted((error for error in errors if error is not None), key=_is_consequence)
    if failures:
        raise failures[0]
    if not all(end.done() and not end.cancelled() for end in ends):
        raise Unavailable("one end of the transfer did not say how it ended")


def _is_consequence(error: BaseException) -> bool:
    return isinstance(error, Unavailable | Cancelled | Unauthorized)
