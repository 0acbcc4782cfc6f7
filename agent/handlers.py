"""What each command does: one row a command, from its typed arguments to calls of the driver."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.drivers.base import Driver
from agent.images import Images
from agent.progress import ProgressReporter
from agent.publishing import Publishing
from agent.sampler import Sampler
from agent.transfers import Transfers
from common.commands import (
    COMMANDS,
    AdoptContainer,
    Arguments,
    CopyContainer,
    CreateContainer,
    CreateSnapshot,
    DeleteContainer,
    DeleteSnapshot,
    DropImage,
    EndTransfer,
    EnsureImage,
    FreezeContainer,
    PublishContainer,
    ReceiveContainer,
    RenameContainer,
    RenameSnapshot,
    RestoreSnapshot,
    SendContainer,
    SettleAdoption,
    StartContainer,
    StopContainer,
    UnfreezeContainer,
    UpdateContainer,
)
from common.errors import Conflict, NotFound
from common.messages import Outcome


@dataclass(frozen=True)
class Node:
    """What the handlers work with."""

    driver: Driver
    images: Images
    transfers: Transfers
    publishing: Publishing
    sampler: Sampler


Done = tuple[Outcome, float | None]
"""What a command led to, and when the sample in it was taken (seconds since 1970)."""
Handler = Callable[[Node, Any, ProgressReporter], Awaitable[Done]]


async def _outcome(node: Node, container: str) -> Done:
    """The container as it is now, with figures taken at once."""
    report = await node.driver.inspect(container)
    sampled_at, sample = await node.sampler.take(container)
    return Outcome(container=report, sample=sample), sampled_at if sample is not None else None


async def _ensure_image(node: Node, arguments: EnsureImage, report: ProgressReporter) -> Done:
    return Outcome(bytes=await node.images.ensure(arguments.image, arguments.privileged, report)), None


async def _drop_image(node: Node, arguments: DropImage, _report: ProgressReporter) -> Done:
    await node.images.drop(arguments.fingerprint)
    return Outcome(), None


async def _publish(node: Node, arguments: PublishContainer, report: ProgressReporter) -> Done:
    return Outcome(bytes=await node.publishing.publish(arguments, report)), None


async def _create(node: Node, arguments: CreateContainer, _report: ProgressReporter) -> Done:
    await node.driver.create(arguments.spec, arguments.image)
    return await _outcome(node, arguments.spec.id)


async def _copy(node: Node, arguments: CopyContainer, _report: ProgressReporter) -> Done:
    await node.driver.copy(arguments.spec, arguments.source, arguments.snapshot, arguments.refresh)
    return await _outcome(node, arguments.spec.id)


async def _send(node: Node, arguments: SendContainer, report: ProgressReporter) -> Done:
    return Outcome(bytes=await node.transfers.send(arguments, report)), None


async def _receive(node: Node, arguments: ReceiveContainer, report: ProgressReporter) -> Done:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    transferred = await node.transfers.receive(arguments, report)
    round_ = Outcome(bytes=transferred, seconds=loop.time() - begun)
    if not arguments.last:
        return round_, None  # there is no container yet
    outcome, sampled_at = await _outcome(node, arguments.spec.id)
    return msgspec.structs.replace(outcome, bytes=round_.bytes, seconds=round_.seconds), sampled_at


async def _end_transfer(node: Node, arguments: EndTransfer, _report: ProgressReporter) -> Done:
    await node.driver.end_transfer(arguments.transfer)
    return Outcome(), None


async def _delete(node: Node, arguments: DeleteContainer, _report: ProgressReporter) -> Done:
    # Where nothing is left to be seen, the driver still removes what a crash may have left.
    with contextlib.suppress(NotFound):
        present = await node.driver.inspect(arguments.container)
        if present.generation != arguments.generation:
            text = f"container {present.id} here is of generation {present.generation}, not {arguments.generation}"
            raise Conflict(text, field="generation")
    await node.driver.delete(arguments.container, arguments.force)
    return Outcome(), None


async def _start(node: Node, arguments: StartContainer, _report: ProgressReporter) -> Done:
    await node.driver.start(arguments.container)
    node.sampler.follow(arguments.container)
    return await _outcome(node, arguments.container)


async def _stop(node: Node, arguments: StopContainer, _report: ProgressReporter) -> Done:
    await node.driver.stop(arguments.container, arguments.timeout, arguments.force)
    return await _outcome(node, arguments.container)


async def _freeze(node: Node, arguments: FreezeContainer, _report: ProgressReporter) -> Done:
    await node.driver.freeze(arguments.container)
    return await _outcome(node, arguments.container)


async def _unfreeze(node: Node, arguments: UnfreezeContainer, _report: ProgressReporter) -> Done:
    await node.driver.unfreeze(arguments.container)
    return await _outcome(node, arguments.container)


async def _update(node: Node, arguments: UpdateContainer, _report: ProgressReporter) -> Done:
    await node.driver.update(arguments.spec)
    return await _outcome(node, arguments.spec.id)


async def _rename(node: Node, arguments: RenameContainer, _report: ProgressReporter) -> Done:
    await node.driver.rename(arguments.container, arguments.spec)
    return await _outcome(node, arguments.spec.id)


async def _create_snapshot(node: Node, arguments: CreateSnapshot, _report: ProgressReporter) -> Done:
    await node.driver.create_snapshot(arguments.container, arguments.snapshot)
    return await _outcome(node, arguments.container)


async def _delete_snapshot(node: Node, arguments: DeleteSnapshot, _report: ProgressReporter) -> Done:
    await node.driver.delete_snapshot(arguments.container, arguments.snapshot)
    return await _outcome(node, arguments.container)


async def _restore_snapshot(node: Node, arguments: RestoreSnapshot, _report: ProgressReporter) -> Done:
    await node.driver.restore_snapshot(arguments.container, arguments.snapshot)
    return await _outcome(node, arguments.container)


async def _rename_snapshot(node: Node, arguments: RenameSnapshot, _report: ProgressReporter) -> Done:
    await node.driver.rename_snapshot(arguments.container, arguments.snapshot, arguments.new)
    return await _outcome(node, arguments.container)


async def _adopt(node: Node, arguments: AdoptContainer, _report: ProgressReporter) -> Done:
    await node.driver.adopt(arguments.spec, arguments.found)
    return await _outcome(node, arguments.spec.id)


async def _settle(node: Node, arguments: SettleAdoption, _report: ProgressReporter) -> Done:
    await node.driver.settle_adoption(arguments.container, arguments.keep)
    try:
        return await _outcome(node, arguments.container)
    except NotFound:
        return Outcome(), None  # it is a stranger again


HANDLERS: dict[type[Arguments], Handler] = {
    EnsureImage: _ensure_image,
    DropImage: _drop_image,
    PublishContainer: _publish,
    CreateContainer: _create,
    CopyContainer: _copy,
    SendContainer: _send,
    ReceiveContainer: _receive,
    EndTransfer: _end_transfer,
    DeleteContainer: _delete,
    StartContainer: _start,
    StopContainer: _stop,
    FreezeContainer: _freeze,
    UnfreezeContainer: _unfreeze,
    UpdateContainer: _update,
    RenameContainer: _rename,
    CreateSnapshot: _create_snapshot,
    DeleteSnapshot: _delete_snapshot,
    RestoreSnapshot: _restore_snapshot,
    RenameSnapshot: _rename_snapshot,
    AdoptContainer: _adopt,
    SettleAdoption: _settle,
}
if HANDLERS.keys() != COMMANDS.keys():
    unmatched = sorted(kind.__name__ for kind in HANDLERS.keys() ^ COMMANDS.keys())
    raise TypeError(f"the tables of commands and of handlers differ: {', '.join(unmatched)}")
