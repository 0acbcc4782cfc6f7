"""Moving a container to another node, under its own id or another.

The container is stopped, its data and snapshots go over, it starts there, and only then does it belong there. Up to
that point everything is undone when something fails; from there on the source is only cleaned up.
"""

from __future__ import annotations

import logging

import msgspec
from msgspec import Struct

from common.commands import DeleteContainer, StartContainer, StopContainer
from common.errors import DeadlinePassed, VzfleetError
from common.reports import ContainerReport, ContainerSpec
from common.states import Status
from controller.operations.kinds import Context, Kind, Step
from controller.operations.power import leave
from controller.operations.transfers import transfer
from controller.records import Operation, Power
from controller.store import containers as rows
from controller.store.db import Transaction

log = logging.getLogger(__name__)
STOP_TIMEOUT = 30.0


class MoveParameters(Struct, frozen=True):
    """A move: the same container as `old` on `source_node` and as `new` (a later generation) on `node`."""

    old: ContainerSpec
    source_node: str
    new: ContainerSpec
    node: str
    description: str
    running: bool
    reserved: tuple[int, int]


async def _stop(context: Context) -> None:
    move = context.parameters(MoveParameters)
    if not move.running:
        return
    try:
        graceful = StopContainer(move.old.id, STOP_TIMEOUT, force=False)
        await context.command(move.source_node, graceful, move.old.generation)
    except DeadlinePassed:
        forced = StopContainer(move.old.id, 0, force=True)
        await context.command(move.source_node, forced, move.old.generation, part="-force")


async def _start_again(context: Context) -> None:
    move = context.parameters(MoveParameters)
    if move.running:
        await context.command(move.source_node, StartContainer(move.old.id), move.old.generation)


async def _transfer(context: Context) -> None:
    move = context.parameters(MoveParameters)
    await transfer(context, move.source_node, move.old, move.node, move.new, snapshot=None, with_snapshots=True)


async def _delete_there(context: Context) -> None:
    move = context.parameters(MoveParameters)
    if not context.refused:
        await context.command(
            move.node, DeleteContainer(move.new.id, move.new.generation, force=True), move.new.generation
        )


async def _start_there(context: Context) -> None:
    move = context.parameters(MoveParameters)
    if move.running:
        await context.command(move.node, StartContainer(move.new.id), move.new.generation)


async def _nothing(_context: Context) -> None:
    return


def _belongs_there(transaction: Transaction, operation: Operation) -> None:
    move = msgspec.convert(operation.parameters, MoveParameters)
    record = rows.require(transaction, move.old.id)
    memory, disk = move.reserved
    moved = msgspec.structs.replace(
        record,
        id=move.new.id,
        node=move.node,
        generation=move.new.generation,
        hostname=move.new.hostname,
        config=move.new.config,
        description=move.description,
        reserved_memory=memory,
        reserved_disk=disk,
    )
    rows.change_id(transaction, move.old.id, moved)


async def _delete_here(context: Context) -> dict[str, str] | None:
    move = context.parameters(MoveParameters)
    try:
        await context.command(
            move.source_node, DeleteContainer(move.old.id, move.old.generation, force=True), move.old.generation
        )
    except VzfleetError as error:
        # The container has moved and works: what stayed behind is shown as unmanaged there.
        log.error("a moved container stayed behind", extra={"operation": context.operation.id, "reason": error.text})
        left = ContainerReport(move.old.id, move.old.generation, Status.STOPPED, move.old.config, move.old.hostname)
        context.resources.fleet.state_changed(move.source_node, left, removed=False)
        return {"left_behind": error.text}
    return None


def _moved(transaction: Transaction, operation: Operation) -> None:
    move = msgspec.convert(operation.parameters, MoveParameters)
    if move.running:
        leave(transaction, operation, Power.RUNNING, move.new.id)
    else:
        rows.release(transaction, operation)


MOVE = Kind(
    name="container.move",
    description="Moving container",
    steps=(
        Step("stop", _stop, _start_again),
        Step("transfer", _transfer, _delete_there),
        Step("start", _start_there),
        Step("switch", _nothing, write=_belongs_there),
        Step("clean", _delete_here),
    ),
    timeout=6 * 3600,
    succeeded=_moved,
    failed=rows.release,
    no_return=3,
)
