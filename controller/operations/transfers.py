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
    # What was sent to the relay of an earlier life is lost: to send has no effect, and is done anew.
    attempt = f"-send~{tokens.send[:8]}" if context.again else "-send"
    sending = asyncio.ensure_future(context.command(source_node, send, source.generation, part=attempt))
    receiving = asyncio.ensure_future(context.command(target_node, receive, target.generation, part="-receive"))
    ends = [sending, receiving]
    try:
        await first_word(sending, receiving)
        # The other end hears at once that it is over, and says how it ended.
        relay.close(context.operation.id)
        await asyncio.wait(ends, timeout=END_TIME)
    finally:
        relay.close(context.operation.id)
        for end in ends:
            end.cancel()
    if not _succeeded(receiving):
        raise_cause(ends)


async def first_word(sending: asyncio.Future[Outcome], receiving: asyncio.Future[Outcome]) -> None:
    """Wait until one end has failed, or all has been received: whole, since a cut stream never looks complete.

    The sender may be at it again after a restart, and would wait in vain for a receiver that has everything.
    """
    await asyncio.wait([sending, receiving], return_when=asyncio.FIRST_COMPLETED)
    if not receiving.done() and _succeeded(sending):
        await asyncio.wait([receiving])


def _succeeded(end: asyncio.Future[Outcome]) -> bool:
    return end.done() and not end.cancelled() and end.exception() is None


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
