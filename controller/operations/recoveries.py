"""Making a container anew elsewhere, since the host that has its files is off.

Its row points to the new node from the accepting transaction on: should the old host come back meanwhile, what it has
is of an older generation and is stopped there.
"""

from __future__ import annotations

import msgspec

from controller.operations.containers import CREATE, CreateParameters
from controller.operations.copies import COPY, CopyParameters
from controller.operations.kinds import Kind
from controller.records import Container, NodeMode, Operation
from controller.store import containers as rows
from controller.store import nodes as node_rows
from controller.store.db import Transaction


class FromImageParameters(CreateParameters, frozen=True):
    """A recovery from an image or an empty root. `old` is the row as it was, `fenced_at` when its node was fenced."""

    old: Container
    fenced_at: str


class FromCopyParameters(CopyParameters, frozen=True, kw_only=True):
    """A recovery as a copy of another container, or of its snapshot."""

    old: Container
    fenced_at: str


def _recovered(transaction: Transaction, operation: Operation) -> None:
    """It is whole; its snapshots stayed on the host that is off."""
    container = operation.containers[0]
    (COPY if operation.kind == FROM_COPY.name else CREATE).succeeded(transaction, operation)
    for snapshot in rows.all_snapshots(transaction.connection, container):
        rows.delete_snapshot(transaction, container, snapshot.name)


def _not_recovered(transaction: Transaction, operation: Operation) -> None:
    """It belongs to its fenced node again, to be recovered once more: unless that came back meanwhile."""
    old = msgspec.convert(operation.parameters["old"], Container)
    record = rows.rows.get(transaction.connection, old.id)
    node = node_rows.rows.get(transaction.connection, old.node)
    fenced = node is not None and node.mode is NodeMode.FENCED and node.fenced_at == operation.parameters["fenced_at"]
    if fenced and record is not None and record.operation == operation.id:
        rows.rows.replace(transaction, old)
        rows.release(transaction, operation)
    else:
        CREATE.failed(transaction, operation)


FROM_IMAGE = Kind("container.recover", "Recovering container", CREATE.steps, CREATE.timeout, _recovered, _not_recovered)
FROM_COPY = Kind(
    "container.recover-by-copy",
    "Recovering container",
    COPY.steps,
    COPY.timeout,
    _recovered,
    _not_recovered,
    no_return=COPY.no_return,
)
