"""Taking, changing, deleting and restoring snapshots."""

from __future__ import annotations

import contextlib

import msgspec
from msgspec import Struct

from common.commands import (
    CreateSnapshot,
    DeleteSnapshot,
    RenameSnapshot,
    RestoreSnapshot,
    StartContainer,
    StopContainer,
)
from common.errors import NotFound
from controller.operations.kinds import Context, Kind, Step
from controller.operations.power import leave_as_before
from controller.records import Operation, Snapshot
from controller.store import containers as rows
from controller.store.db import Transaction


class SnapshotParameters(Struct, frozen=True):
    """A snapshot of a container; `running` says whether it ran when the operation was accepted.

    `expires_at` and `scheduled` are those of a snapshot that is taken.
    """

    container: str
    node: str
    generation: int
    snapshot: str
    config: dict[str, str]
    running: bool
    expires_at: str | None = None
    scheduled: bool = False


class RenameParameters(Struct, frozen=True):
    """Another name for a snapshot."""

    container: str
    node: str
    generation: int
    snapshot: str
    new: str


class UpdateParameters(Struct, frozen=True):
    """When a snapshot expires from now on; None: never."""

    container: str
    snapshot: str
    expires_at: str | None


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


async def _rename(context: Context) -> None:
    wanted = context.parameters(RenameParameters)
    await context.command(wanted.node, RenameSnapshot(wanted.container, wanted.snapshot, wanted.new), wanted.generation)


async def _rename_back(context: Context) -> None:
    wanted = context.parameters(RenameParameters)
    if context.refused:
        return
    with contextlib.suppress(NotFound):  # it was not there to be renamed
        await context.command(
            wanted.node, RenameSnapshot(wanted.container, wanted.new, wanted.snapshot), wanted.generation
        )


def _taken(transaction: Transaction, operation: Operation) -> None:
    wanted = msgspec.convert(operation.parameters, SnapshotParameters)
    row = Snapshot(
        wanted.container,
        wanted.snapshot,
        operation.created_at,
        wanted.config,
        wanted.expires_at,
        wanted.scheduled,
    )
    rows.add_snapshot(transaction, row)
    rows.release(transaction, operation)


def _removed(transaction: Transaction, operation: Operation) -> None:
    wanted = msgspec.convert(operation.parameters, SnapshotParameters)
    rows.delete_snapshot(transaction, wanted.container, wanted.snapshot)
    rows.release(transaction, operation)


def _renamed(transaction: Transaction, operation: Operation) -> None:
    wanted = msgspec.convert(operation.parameters, RenameParameters)
    rows.rename_snapshot(transaction, wanted.container, wanted.snapshot, wanted.new)
    rows.release(transaction, operation)


def _updated(transaction: Transaction, operation: Operation) -> None:
    wanted = msgspec.convert(operation.parameters, UpdateParameters)
    rows.change_snapshot(transaction, wanted.container, wanted.snapshot, {"expires_at": wanted.expires_at})
    rows.release(transaction, operation)


CREATE = Kind("snapshot.create", "Taking snapshot", (Step("take", _take, _remove),), 300, _taken, rows.release)
DELETE = Kind(
    "snapshot.delete", "Deleting snapshot", (Step("remove", _remove),), 300, _removed, rows.release, no_return=0
)
RENAME = Kind(
    "snapshot.rename",
    "Renaming snapshot",
    (Step("rename", _rename, _rename_back),),
    300,
    _renamed,
    rows.release,
)
UPDATE = Kind("snapshot.update", "Changing snapshot", (), 60, _updated, rows.release)
"""Nothing but a row: the node does not know when a snapshot expires."""
RESTORE = Kind(
    "snapshot.restore",
    "Restoring snapshot",
    # Replacing the files has no undo; a container that was stopped for it is started again.
    (Step("stop", _stop, _start), Step("restore", _restore), Step("start", _start)),
    600,
    leave_as_before,
    rows.release,
)
