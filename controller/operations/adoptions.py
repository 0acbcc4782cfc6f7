"""Taking a container that a node has, and that is nobody's, into management."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from msgspec import Struct

from common.clock import timestamp_of
from common.commands import AdoptContainer, SettleAdoption
from common.errors import Internal, VzfleetError
from common.names import CONTAINER_ID
from common.reports import ContainerReport, ContainerSpec
from controller.operations.kinds import Context, Kind, Step
from controller.operations.power import POWER_OF
from controller.records import Operation, Phase, Snapshot
from controller.store import containers as rows
from controller.store.db import Transaction

log = logging.getLogger(__name__)
SETTLE = 1
"""The step from which on it is adopted."""


class AdoptParameters(Struct, frozen=True):
    """An adoption: `spec` is what it is to be, `found` the generation as which its node has it (0: made by hand)."""

    spec: ContainerSpec
    node: str
    found: int


async def _adopt(context: Context) -> dict[str, Any]:
    wanted = context.parameters(AdoptParameters)
    outcome = await context.command(
        wanted.node, AdoptContainer(wanted.spec, wanted.found), generation=wanted.spec.generation
    )
    report = outcome.container or _reported(context, wanted)
    # Snapshots are named as containers are.
    snapshots = [[one.name, one.created_at] for one in report.snapshots if CONTAINER_ID.fullmatch(one.name)]
    return {"adopted": {"status": report.status, "snapshots": snapshots}}


def _reported(context: Context, wanted: AdoptParameters) -> ContainerReport:
    """What the node has told since: a result of before a restart is answered again without the container."""
    live = context.resources.fleet.containers.get(wanted.spec.id)
    if live is None or live.report is None:
        raise Internal(f"node {wanted.node} has not told what it adopted")
    return live.report


async def _give_back(context: Context) -> None:
    wanted = context.parameters(AdoptParameters)
    if not context.refused:
        await context.command(wanted.node, SettleAdoption(wanted.spec.id, keep=False), wanted.spec.generation)


async def _forget_before(context: Context) -> dict[str, str] | None:
    wanted = context.parameters(AdoptParameters)
    try:
        await context.command(wanted.node, SettleAdoption(wanted.spec.id, keep=True), wanted.spec.generation)
    except VzfleetError as error:
        # It is adopted and works: what it was before stays on its node.
        log.error("an adoption is not settled", extra={"operation": context.operation.id, "reason": error.text})
        return {"left_behind": error.text}
    return None


def _adopted(transaction: Transaction, operation: Operation) -> None:
    wanted = msgspec.convert(operation.parameters, AdoptParameters)
    found = operation.outputs["adopt"]["adopted"]
    record = rows.require(transaction, wanted.spec.id)
    power = POWER_OF.get(found["status"])
    rows.rows.replace(transaction, msgspec.structs.replace(record, phase=Phase.READY, operation=None, power=power))
    for name, created_at in found["snapshots"]:
        at = timestamp_of(created_at) or record.created_at
        rows.add_snapshot(transaction, Snapshot(record.id, name, at, record.config))


def _not_adopted(transaction: Transaction, operation: Operation) -> None:
    """It is nobody's, as before; unless it failed by a fault of ours once it was adopted."""
    if operation.error is not None and operation.error.step == SETTLE:
        _adopted(transaction, operation)
        return
    record = rows.rows.get(transaction.connection, operation.containers[0])
    if record is not None and record.operation == operation.id:
        rows.rows.delete(transaction, record.id)


ADOPT = Kind(
    "container.adopt",
    "Adopting container",
    (Step("adopt", _adopt, _give_back), Step("settle", _forget_before)),
    3600,
    _adopted,
    _not_adopted,
    no_return=SETTLE,
)
