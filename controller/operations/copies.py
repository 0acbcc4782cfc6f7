"""Copying a container, or one of its snapshots, to a new container on any node."""

from __future__ import annotations

import logging

import msgspec
from msgspec import Struct

from common.commands import CopyContainer, CreateSnapshot, DeleteContainer, DeleteSnapshot, StartContainer
from common.errors import VzfleetError
from common.reports import ContainerSpec
from controller.operations.containers import creation_failed
from controller.operations.kinds import Context, Kind, Step
from controller.operations.power import leave, started
from controller.operations.transfers import transfer
from controller.records import Operation, Phase
from controller.store import containers as rows
from controller.store.db import Transaction

log = logging.getLogger(__name__)


class CopyParameters(Struct, frozen=True):
    """A copy: `spec` is the new container's, `source` the old one's; `snapshot` when it is one that is copied."""

    spec: ContainerSpec
    node: str
    source: ContainerSpec
    source_node: str
    snapshot: str | None
    start: bool

    @property
    def pinned(self) -> bool:
        """Whether the source must be held still by a snapshot while its data travels."""
        return self.snapshot is None and self.node != self.source_node


def _pin(context: Context) -> str:
    return f"copy-{context.operation.id}"


async def _hold(context: Context) -> None:
    wanted = context.parameters(CopyParameters)
    if wanted.pinned:
        await context.command(
            wanted.source_node, CreateSnapshot(wanted.source.id, _pin(context)), wanted.source.generation
        )


async def _let_go(context: Context) -> None:
    wanted = context.parameters(CopyParameters)
    if wanted.pinned:
        await context.command(
            wanted.source_node, DeleteSnapshot(wanted.source.id, _pin(context)), wanted.source.generation
        )


async def _copy(context: Context) -> None:
    wanted = context.parameters(CopyParameters)
    if wanted.node == wanted.source_node:
        arguments = CopyContainer(wanted.spec, wanted.source.id, wanted.snapshot)
        await context.command(wanted.node, arguments, wanted.spec.generation)
        return
    snapshot = wanted.snapshot or _pin(context)
    await transfer(
        context,
        wanted.source_node,
        wanted.source,
        wanted.node,
        wanted.spec,
        snapshot=snapshot,
        with_snapshots=False,
    )


async def _delete_copy(context: Context) -> None:
    wanted = context.parameters(CopyParameters)
    if not context.refused:
        await context.command(
            wanted.node, DeleteContainer(wanted.spec.id, wanted.spec.generation, force=True), wanted.spec.generation
        )


async def _clean(context: Context) -> dict[str, str] | None:
    try:
        await _let_go(context)
    except VzfleetError as error:
        # The copy is whole and works: it is not thrown away because its source is out of reach by now.
        log.error("a copy's snapshot stayed behind", extra={"operation": context.operation.id, "reason": error.text})
        return {"left_behind": error.text}
    return None


async def _start_copy(context: Context) -> None:
    wanted = context.parameters(CopyParameters)
    if wanted.start:
        await context.command(wanted.node, StartContainer(wanted.spec.id), wanted.spec.generation)


def _copied(transaction: Transaction, operation: Operation) -> None:
    record = rows.require(transaction, operation.containers[0])
    rows.rows.replace(transaction, msgspec.structs.replace(record, phase=Phase.READY, error=None))
    leave(transaction, operation, started(operation.parameters["start"]))


COPY = Kind(
    name="container.copy",
    description="Copying container",
    steps=(
        Step("hold", _hold, _let_go),
        Step("copy", _copy, _delete_copy),
        Step("start", _start_copy),
        Step("let-go", _clean),
    ),
    timeout=6 * 3600,
    succeeded=_copied,
    failed=creation_failed,
    no_return=3,
)
