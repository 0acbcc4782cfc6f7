"""Moving a container to another node, under its own id or another.

What runs goes over while it runs, then what has changed meanwhile; then it is stopped, the rest goes over, it starts
there, and only then does it belong there. Up to that point everything is undone when something fails: where it was it
starts again at once, unless it may have been started there, which is then undone first. From that point on the source
is only cleaned up.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct

from common.clock import timestamp
from common.commands import DeleteContainer, StartContainer, StopContainer
from common.errors import Abandoned, Conflict, DeadlinePassed, Stale, Unavailable, VzfleetError
from common.reports import ContainerReport, ContainerSpec
from common.states import Status
from controller.operations.kinds import Context, Kind, Step
from controller.operations.power import leave
from controller.operations.transfers import Journey, end, ended, raise_first, travel, travelled
from controller.records import NodeMode, Operation, Power
from controller.store import containers as rows
from controller.store.db import Transaction

log = logging.getLogger(__name__)
STOP_TIMEOUT = 30.0
DOWN_PATIENCE = 30.0
"""Seconds for which the target may be out of reach while the container is down."""
DIFFERENCES = 4
"""How many rounds there are at most between the first one and the stop."""
SMALL = 1_000_000
"""Bytes: a round with no more leaves little for the next one."""
QUICK = 1.0
"""Seconds: after a round that took less, the next one would not be worth its while either."""
SHRINKING = 0.8
"""A round must be less than that share of the one before, else it will not get better."""


class MoveParameters(Struct, frozen=True):
    """A move: the same container as `old` on `source_node` and as `new` (a later generation) on `node`.

    `timeout` in seconds for its own shutdown, `force`: it is not asked. `rate`: bytes per second at most.
    """

    old: ContainerSpec
    source_node: str
    new: ContainerSpec
    node: str
    description: str
    running: bool
    reserved: tuple[int, int]
    timeout: float = STOP_TIMEOUT
    force: bool = False
    rate: int | None = None


def _journey(move: MoveParameters) -> Journey:
    return Journey(move.source_node, move.old, move.node, move.new, move.rate, moving=True)


# ---------------------------------------------------------------- while it runs


async def _copy(context: Context) -> dict[str, Any] | None:
    move = context.parameters(MoveParameters)
    if not move.running:
        return None
    return await travel(context, _journey(move), last=False, stage="copying")


async def _copy_difference(number: int, context: Context) -> dict[str, Any] | None:
    move = context.parameters(MoveParameters)
    if not move.running or not worth_another(travelled(context)["rounds"]):
        return None
    return await travel(context, _journey(move), last=False, stage=f"copying difference {number}")


def worth_another(rounds: list[dict[str, Any]]) -> bool:
    """Whether another round while it runs would make the last one shorter, by the bytes and seconds of those before."""
    last = rounds[-1]
    if last["bytes"] <= SMALL or last["seconds"] < QUICK:
        return False
    return len(rounds) == 1 or last["bytes"] < SHRINKING * rounds[-2]["bytes"]


async def _forget(context: Context) -> None:
    """Nothing stays behind, there or here. Both are tried, whatever becomes of one."""
    move = context.parameters(MoveParameters)
    raise_first(await asyncio.gather(_delete_there(context), end(context, _journey(move)), return_exceptions=True))


# ---------------------------------------------------------------- while it is down


async def _stop(context: Context) -> dict[str, Any] | None:
    move = context.parameters(MoveParameters)
    if not move.running:
        return None
    context.report("stopping", None)
    clock = context.resources.clock
    begun = clock.monotonic()
    await _shut_down(context, move)
    took = round(clock.monotonic() - begun, 3)
    return {"stopped_at": timestamp(clock.now()), "downtime": {"stopping_seconds": took}}


async def _shut_down(context: Context, move: MoveParameters) -> None:
    if not move.force:
        try:
            graceful = StopContainer(move.old.id, move.timeout, force=False)
            await context.command(move.source_node, graceful, move.old.generation)
            return
        except DeadlinePassed:
            log.info("a container is killed for its move", extra={"operation": context.operation.id})
    forced = StopContainer(move.old.id, 0, force=True)
    await context.command(move.source_node, forced, move.old.generation, part="-force")


async def _start_again(context: Context) -> None:
    move = context.parameters(MoveParameters)
    if move.running:
        await context.command(move.source_node, StartContainer(move.old.id), move.old.generation)


async def _copy_rest(context: Context) -> dict[str, Any]:
    move = context.parameters(MoveParameters)
    stage, patience = ("copying the rest", DOWN_PATIENCE) if move.running else ("copying", None)
    return await travel(context, _journey(move), last=True, stage=stage, patience=patience)


async def _start_there(context: Context) -> dict[str, Any] | None:
    move = context.parameters(MoveParameters)
    if not move.running:
        return None
    context.report("starting", None)
    await context.command(move.node, StartContainer(move.new.id), move.new.generation)
    stopped = context.operation.outputs["stop"]
    down = (context.resources.clock.now() - datetime.fromisoformat(stopped["stopped_at"])).total_seconds()
    return {"downtime": {"seconds": round(max(0.0, down), 3), **stopped["downtime"]}}


async def _take_back(context: Context) -> None:
    """Make sure that it does not run there. As long as that cannot be known it is started nowhere."""
    target = context.resources.fleet.nodes.get(context.parameters(MoveParameters).node)
    try:
        await _delete_there(context)
    except Abandoned as error:
        if target is not None and target.record.mode is NodeMode.FENCED:
            raise  # its host is off, by an operator's word
        raise Unavailable(f"{error.text}; since it may run there, it is not started where it was") from None


async def _delete_there(context: Context) -> None:
    move, error = context.parameters(MoveParameters), context.operation.error
    if error is not None and error.code == Conflict.code and error.step is not None and error.step <= REST:
        return  # it was not made, since another one may be there that is not ours
    try:
        await context.command(
            move.node, DeleteContainer(move.new.id, move.new.generation, force=True), move.new.generation
        )
    except (Conflict, Stale) as refusal:
        # The node has another one under that id, which stays: this one is not there.
        if refusal.field != "generation":
            raise


# ---------------------------------------------------------------- once it runs there


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


async def _clean(context: Context) -> dict[str, str] | None:
    move = context.parameters(MoveParameters)
    left = await asyncio.gather(_delete_here(context, move), ended(context, _journey(move)))
    reasons = [reason for reason in left if reason is not None]
    return {"left_behind": "; ".join(dict.fromkeys(reasons))} if reasons else None


async def _delete_here(context: Context, move: MoveParameters) -> str | None:
    try:
        await context.command(
            move.source_node, DeleteContainer(move.old.id, move.old.generation, force=True), move.old.generation
        )
    except VzfleetError as error:
        # The container has moved and works: what stayed behind is shown as unmanaged there.
        log.error("a moved container stayed behind", extra={"operation": context.operation.id, "reason": error.text})
        left = ContainerReport(move.old.id, move.old.generation, Status.STOPPED, move.old.config, move.old.hostname)
        context.resources.fleet.state_changed(move.source_node, left, removed=False)
        return error.text
    return None


def _moved(transaction: Transaction, operation: Operation) -> None:
    move = msgspec.convert(operation.parameters, MoveParameters)
    if move.running:
        leave(transaction, operation, Power.RUNNING, move.new.id)
    else:
        rows.release(transaction, operation)


_DIFFERENCES = tuple(
    Step(f"difference-{number}", partial(_copy_difference, number)) for number in range(1, DIFFERENCES + 1)
)
REST = 1 + DIFFERENCES + 1
"""The step with which it is there."""
_BEFORE = (
    Step("copy", _copy, _forget),
    *_DIFFERENCES,
    Step("stop", _stop, _start_again),
    Step("rest", _copy_rest),
    Step("start", _start_there, _take_back),
)
MOVE = Kind(
    name="container.move",
    description="Moving container",
    steps=(*_BEFORE, Step("switch", _nothing, write=_belongs_there), Step("clean", _clean)),
    timeout=24 * 3600,
    succeeded=_moved,
    failed=rows.release,
    no_return=len(_BEFORE),
)
