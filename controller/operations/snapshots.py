"""Taking, deleting and restoring snapshots."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from common.commands import CreateSnapshot, DeleteSnapshot, RestoreSnapshot, StartContainer, StopContainer
from controller.operations.kinds import Context, Kind, Step
from controller.operations.power import leave_as_before
from controller.records import Operation, Snapshot
from controller.store import containers as rows
from controller.store.db import Transaction


class SnapshotParameters(Struct, frozen=True):
    """A snapshot of a container; `running` says whether it ran when the operation was accepted."""

    container: str
    node: str
    generation: int
    snapshot: str
    config: dict[str, str]
    running: bool


async def _take(context: Context) -> None:
    wanted = context.parameters(SnapshotParameters)
    await context.command(wanted.node, CreateSnapshot(wanted.container, wanted.snapshot), wanted.generation)


async def _remove(context: Context) -> None:
    wanted = context.parameters(SnapshotParameters)
    if not context.refused:
        await context.command(wanted.node, DeleteSnapshot(wanted.container, wanted.snapshot), wanted.generation)


async def _stop(context: Context) -> None:
    wanted = context.parameters(SnapshotParameters)
    if wanted.running:
        # Its files are about to be replaced: what a graceful stop would still write is lost anyway.
        await context.command(wanted.node, StopContainer(wanted.container, 0, force=True), wanted.generation)


async def _start(context: Context) -> None:
    wanted = context.parameters(SnapshotParameters)
    if wanted.running:
        await context.command(wanted.node, StartContainer(wanted.container), wanted.generation)


async def _restore(context: Context) -> None:
    wanted = context.parameters(SnapshotParameters)
    await context.command(wanted.node, RestoreSnapshot(wanted.container, wanted.snapshot), wanted.generation)


def _taken(transaction: Transaction, operation: Operation) -> None:
    wanted = msgspec.convert(operation.parameters, SnapshotParameters)
    row = Snapshot(wanted.container, wanted.snapshot, operation.created_at, wanted.config)
    rows.add_snapshot(transaction, row)
    rows.release(transaction, operation)


def _removed(transaction: Transaction, operation: Operation) -> None:
    wanted = msgspec.convert(operation.parameters, SnapshotParameters)
    rows.delete_snapshot(transaction, wanted.container, wanted.snapshot)
    rows.release(transaction, operation)


CREATE = Kind("snapshot.create", "Taking snapshot", (Step("take", _take, _remove),), 300, _taken, rows.release)
DELETE = Kind(
    "snapshot.delete", "Deleting snapshot", (Step("remove", _remove),), 300, _removed, rows.release, no_return=0
)
RESTORE = Kind(
    "snapshot.restore",
    "Restoring snapshot",
    # Replacing the files has no undo; a container that was stopped for it is started again.
    (Step("stop", _stop, _start), Step("restore", _restore), Step("start", _start)),
    600,
    leave_as_before,
    rows.release,
)
