"""A fake container on its way between two nodes: one message there with all that it is, and one word back."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from agent.channel.base import Channel
from agent.drivers.base import Incoming, Outgoing, ReportTransfer
from agent.drivers.fake_node import FakeNode
from agent.drivers.fake_state import FakeContainer, FakeSnapshot
from common.errors import Conflict, InvalidRequest, Unavailable
from common.names import TRANSFER, TRANSFER_RULE

_MAX_MESSAGE = 64 * 1024 * 1024
_WHOLE = b"whole"


class _Sent(Struct):
    """What a round carries."""

    round: int
    content: str
    snapshots: list[FakeSnapshot]


async def send(node: FakeNode, what: Outgoing, channel: Channel, report: ReportTransfer) -> None:
    """Send one round, see `Driver.send`."""
    _check(what.transfer)
    await node.reach("container.send", what.container)
    found = node.find(what.container)
    if what.moving and what.last and found.running:
        raise Conflict(f"container {what.container} is running")
    content = node.content(what.container, what.snapshot)
    message = msgspec.json.encode(_Sent(what.round, content, found.snapshots if what.with_snapshots else []))
    _keep(node, what.transfer, what.round)
    await channel.write(message)
    report("files", len(message), len(message))
    await channel.end()
    if await _read(channel) != _WHOLE:
        raise Unavailable("the other end does not say that it has everything")


async def receive(node: FakeNode, what: Incoming, channel: Channel) -> None:
    """Take one round, see `Driver.receive`."""
    _check(what.transfer)
    try:
        sent = msgspec.json.decode(await _read(channel), type=_Sent)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the message holds no container: {error}") from None
    if sent.round != what.round:
        raise InvalidRequest(f"this is round {sent.round} and not {what.round}")
    await node.reach("container.receive", what.spec.id)
    if what.refresh:
        _refresh(node, what, sent)
    elif not node.present(what.spec) and what.last:
        node.add("container.receive", what.spec, sent.content, sent.snapshots)
    _keep(node, what.transfer, what.round)
    await channel.write(_WHOLE)
    await channel.end()


def _refresh(node: FakeNode, what: Incoming, sent: _Sent) -> None:
    there = node.find(what.spec.id)
    node.present(what.spec)
    if there.running:
        raise Conflict(f"container {what.spec.id} is running")
    if what.last:
        refresh(node, "container.receive", there, sent.content, sent.snapshots)


def refresh(node: FakeNode, command: str, there: FakeContainer, content: str, snapshots: list[FakeSnapshot]) -> None:
    """Give a stopped container other content, and the snapshots that it has not."""
    new = [snapshot for snapshot in snapshots if there.snapshot(snapshot.name) is None]
    if there.content != content or new:
        there.content, there.snapshots = content, there.snapshots + new
        node.done(command, there.spec.id)


async def end(node: FakeNode, transfer: str) -> None:
    """Forget a transfer, see `Driver.end_transfer`."""
    _check(transfer)
    await node.reach("transfer.end", transfer)
    if node.world.transfers.pop(transfer, None) is not None:
        node.done("transfer.end", transfer)


def _check(transfer: str) -> None:
    if not TRANSFER.fullmatch(transfer):
        raise InvalidRequest("unusable id of a transfer", field="transfer", allowed=TRANSFER_RULE)


def _keep(node: FakeNode, transfer: str, round: int) -> None:
    if node.world.transfers.get(transfer) != round:
        node.world.transfers[transfer] = round
        node.save()


async def _read(channel: Channel) -> bytes:
    received = bytearray()
    while piece := await channel.read():
        received += piece
        if len(received) > _MAX_MESSAGE:
            raise InvalidRequest("the message is too long for a fake container")
    return bytes(received)
