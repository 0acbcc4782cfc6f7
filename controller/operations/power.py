"""What operations that succeeded left their container as, written with their end: drift is measured against it."""

from __future__ import annotations

import msgspec

from common.states import Status
from controller.operations.kinds import Write
from controller.records import Operation, Power
from controller.store import containers as rows
from controller.store.db import Transaction

POWER_OF = {Status.RUNNING: Power.RUNNING, Status.FROZEN: Power.FROZEN, Status.STOPPED: Power.STOPPED}
STATUS_OF = {power: status for status, power in POWER_OF.items()}


def started(start: bool) -> Power:
    """What a container was made as."""
    return Power.RUNNING if start else Power.STOPPED


def leave(transaction: Transaction, operation: Operation, power: Power, container: str | None = None) -> None:
    """Write what `container` (the operation's first one) is from now on, and free all that it works on."""
    record = rows.rows.get(transaction.connection, container or operation.containers[0])
    if record is not None and record.operation == operation.id:
        rows.rows.replace(transaction, msgspec.structs.replace(record, power=power))
    rows.release(transaction, operation)


def leaves(power: Power) -> Write:
    """The end of an operation that leaves its container so."""
    return lambda transaction, operation: leave(transaction, operation, power)


def leave_as_before(transaction: Transaction, operation: Operation) -> None:
    """The end of one that stops a running container for its work (`running` of its parameters) and starts it again."""
    if operation.parameters["running"]:
        leave(transaction, operation, Power.RUNNING)
    else:
        rows.release(transaction, operation)
