"""All operations under way: begins them, goes on with them after a restart, shows, awaits and cancels them.

After a restart an operation goes on where it stood: the step that was under way is run again with the same command
ids, and the node answers from its journal what it has done already.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from common.errors import Conflict, NotFound
from common.failpoints import FailPoints, never
from common.states import Status
from common.tasks import Tasks
from controller.operations import machine
from controller.operations.execution import Acknowledge, Execution, Progressed
from controller.operations.kinds import Kind, Resources
from controller.operations.machine import State
from controller.operations.recorder import Recorder
from controller.records import Operation
from controller.store import operations as rows
from controller.store.db import Database

log = logging.getLogger(__name__)


class Engine:
    """Runs all operations of the controller, each by an `Execution`."""

    def __init__(
        self,
        store: Database,
        kinds: Mapping[str, Kind],
        resources: Resources,
        acknowledge: Acknowledge,
        failpoints: FailPoints = never,
        progressed: Progressed = lambda _: None,
    ) -> None:
        self._store = store
        self._kinds = kinds
        self._resources = resources
        self._acknowledge = acknowledge
        self._reach = failpoints
        self._progressed = progressed
        self._recorder = Recorder(store, resources.clock)
        self._running: dict[str, Execution] = {}
        self._tasks = Tasks("operations")

    def kind(self, name: str) -> Kind:
        """The kind of this name; KeyError is a programming error."""
        return self._kinds[name]

    def description(self, name: str) -> str:
        """What operations of this kind do; the name itself for one that an older version knew."""
        return self._kinds[name].description if name in self._kinds else name

    def start(self, operation: Operation, resumed: bool = False) -> None:
        """Begin with an operation whose row is committed, or go on with one of an earlier life of the controller."""
        kind = self._kinds[operation.kind]
        execution = Execution(
            operation,
            kind,
            self._resources,
            self._recorder,
            self._acknowledge,
            self._reach,
            self._progressed,
            resumed,
        )
        self._running[operation.id] = execution
        self._tasks.start(self._run(operation.id, execution), operation.id)

    async def _run(self, operation: str, execution: Execution) -> None:
        try:
            await execution.run()
        finally:
            self._running.pop(operation, None)

    async def resume(self) -> None:
        """Go on with all that had not ended when the controller did."""
        for operation in await self._store.read(rows.unfinished):
            if operation.kind not in self._kinds:
                log.error("an operation of an unknown kind is ended", extra={"operation": operation.id})
                await self._recorder.give_up(operation)
                continue
            log.info("operation resumed", extra={"operation": operation.id, "kind": operation.kind})
            self.start(operation, resumed=True)

    async def close(self) -> None:
        """Leave all operations where they stand; they are resumed at the next start."""
        await self._tasks.close()

    # ------------------------------------------------------------ what callers ask

    async def get(self, operation: str) -> Operation:
        """The operation as it is now, its progress included. Raises NotFound."""
        running = self._running.get(operation)
        if running is not None:
            return running.operation
        record = await self._store.read(lambda connection: rows.rows.get(connection, operation))
        if record is None:
            raise NotFound(f"operation {operation} not found", field="operation")
        return record

    def under_way(self, operation: str) -> Operation | None:
        """The operation as it is now, if it runs."""
        running = self._running.get(operation)
        return None if running is None or running.operation.status.final else running.operation

    def live(self, operation: Operation) -> Operation:
        """The running state of an operation that was read from the store, if it runs."""
        running = self._running.get(operation.id)
        return operation if running is None else running.operation

    def over(self, command: str) -> bool:
        """Whether nothing asks for this command's result any more, so that the node need not tell it again."""
        running = self._running.get(command.partition("/")[0])
        return running is None or running.is_past(command)

    def may_cancel(self, operation: Operation) -> bool:
        """Whether a cancel would be heard."""
        kind = self._kinds.get(operation.kind)
        return kind is not None and machine.may_cancel(kind.shape, State.of(operation))

    async def wait(self, operation: str, timeout: float | None) -> Operation:
        """The operation once it has ended, or as it is after `timeout` seconds. Raises NotFound."""
        running = self._running.get(operation)
        if running is None:
            return await self.get(operation)
        await running.wait(timeout)
        return running.operation

    async def abandon(self, operation: str) -> None:
        """End an operation without the nodes that it waits for in vain, and undo what can be undone elsewhere.

        Raises NotFound, or Conflict when it has ended or waits for no node that is out of reach.
        """
        running = self._running.get(operation)
        if running is None:
            await self.get(operation)
            raise Conflict("the operation has ended already", field="operation", allowed="a running one")
        running.abandon()
        await running.wait(None)

    async def cancel(self, operation: str) -> None:
        """Ask an operation to stop and undo what it did. Raises NotFound, or Conflict when it cannot be cancelled."""
        running = self._running.get(operation)
        if running is None:
            await self.get(operation)
            raise Conflict(
                "the operation has ended already", field="operation", allowed="a running one that may_cancel"
            )
        if not self.may_cancel(running.operation):
            raise Conflict(
                "the operation is past the point where it can be cancelled",
                field="operation",
                allowed="a running one that may_cancel",
            )
        # Heard before it is written: no step's record can then put another status over it.
        running.cancel()
        await self._store.write(lambda transaction: rows.mark_cancelling(transaction, operation))
        if running.operation.status in (Status.SUCCESS, Status.FAILURE):
            raise Conflict("the operation has ended already", field="operation")
