"""The reconcile-only mode: after committed rows were lost, no writes until the nodes have told what they really have.

It begins when the start finds commits missing (a damaged write-ahead log, a backup put back), or when an agent has
seen more than the controller knows. It survives a restart. It ends when every node that has not been fenced has
delivered its inventory, or when an administrator says so.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
from msgspec import Struct

from common.clock import Clock, timestamp
from common.errors import Stale, Unavailable
from common.messages import Inventory
from common.states import Status
from controller.events import Events
from controller.fleet import Fleet
from controller.records import NodeMode, Operation, OperationError, Phase
from controller.store import containers, operations
from controller.store.db import Database, Transaction
from controller.store.files import replace_file

log = logging.getLogger(__name__)
FILE = "reconcile.json"
LOST = "rows of the controller were lost while it was under way: whether its steps were carried out cannot be known"


class Begun(Struct, frozen=True):
    """Since when and why there are no writes."""

    reason: str
    since: str


class Reconciliation:
    """Whether writes are accepted, and whose inventory is awaited. `state` is the controller's directory."""

    def __init__(self, state: Path, fleet: Fleet, store: Database, events: Events, clock: Clock) -> None:
        self._file = state / FILE
        self._fleet = fleet
        self._store = store
        self._events = events
        self._clock = clock
        self._delivered: set[str] = set()
        self._begun = self._read()

    def _read(self) -> Begun | None:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Begun)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError:
            return Begun(f"{FILE} says so, and cannot be read", timestamp(self._clock.now()))

    # ------------------------------------------------------------ the mode

    @property
    def begun(self) -> Begun | None:
        """Why and since when; None while writes are accepted."""
        if self._begun is not None and not self.awaited:
            self._end("all nodes have delivered their inventories")
        return self._begun

    @property
    def kept(self) -> bool:
        """Whether rows were lost, and this was not settled before the start."""
        return self._begun is not None

    @property
    def awaited(self) -> list[str]:
        """The nodes that are not fenced and have not delivered their inventory since the controller's start."""
        every = self._fleet.nodes.items()
        return sorted(
            name for name, node in every if name not in self._delivered and node.record.mode is not NodeMode.FENCED
        )

    def begin(self, reason: str) -> None:
        """Accept no writes from now on, nor after a restart. Raises OSError when that cannot be kept."""
        begun = Begun(reason, timestamp(self._clock.now()))
        replace_file(self._file, msgspec.json.encode(begun))
        log.critical("no writes are accepted until the nodes have told what they have", extra={"reason": reason})
        self._begun = begun

    def end(self, who: str) -> None:
        """An administrator accepts what is missing."""
        if self._begun is not None:
            self._end(f"{who} says so; not awaited any more: {', '.join(self.awaited) or 'none'}")

    def _end(self, why: str) -> None:
        self._begun = None
        self._file.unlink(missing_ok=True)
        log.warning("writes are accepted again", extra={"reason": why})
        self._events.note("reconciliation-ended", "/1.0/reconciliation", details={"reason": why})

    def check(self) -> None:
        """Raise Unavailable while writes are refused."""
        begun = self.begun
        if begun is not None:
            raise Unavailable(
                f"the controller accepts no writes until its nodes have told what they have: {begun.reason}. "
                f"Awaited: {', '.join(self.awaited)}. An administrator ends this by PUT /1.0/reconciliation"
            )

    # ------------------------------------------------------------ what it does to the rows

    async def end_unfinished(self) -> None:
        """End what was under way in a database that has lost rows: to go on might do something a second time."""
        now = timestamp(self._clock.now())
        ended = await self._store.write(lambda transaction: _end_unfinished(transaction, now))
        for operation in ended:
            log.error("an operation is ended: rows were lost", extra={"operation": operation})

    async def delivered(self, node: str, inventory: Inventory) -> None:
        """A node has told all that it has."""
        if self._begun is not None:
            whole = {report.id: report.generation for report in inventory.containers if report.status != Status.ERROR}
            await self._store.write(lambda transaction: _take_as_found(transaction, node, whole))
        self._delivered.add(node)
        if self.begun is not None:
            log.info("an inventory was delivered", extra={"node": node, "awaited": self.awaited})


def _end_unfinished(transaction: Transaction, now: str) -> list[str]:
    ended: list[str] = []
    for operation in operations.unfinished(transaction.connection):
        failed = msgspec.structs.replace(
            operation, status=Status.FAILURE, error=_lost(operation), updated_at=now, ended_at=now
        )
        operations.rows.replace(transaction, failed)
        containers.give_up(transaction, failed)
        ended.append(operation.id)
    return ended


def _lost(operation: Operation) -> OperationError:
    text = f"{operation.error.text}; and {LOST}" if operation.error is not None else LOST
    return OperationError(Stale.code, text, operation.position)


def _take_as_found(transaction: Transaction, node: str, whole: dict[str, int]) -> None:
    """A container whose creation was ended by `end_unfinished`, and which its node has all the same, is whole."""
    for id, generation in whole.items():
        record = containers.rows.get(transaction.connection, id)
        if record is None or (record.node, record.generation, record.phase) != (node, generation, Phase.FAILED):
            continue
        if record.error is not None and record.error.endswith(LOST) and record.operation is None:
            found = msgspec.structs.replace(record, phase=Phase.READY, error=None)
            containers.rows.replace(transaction, found)
