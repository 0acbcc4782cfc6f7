"""Carries operations out: asks the state machine, runs the step, records it, until the end.

Every step is recorded before the next begins. After a restart an operation goes on where it stood: the step that was
under way is run again with the same command ids, and the node answers from its journal what it has done already.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from common.clock import timestamp
from common.errors import Cancelled, Conflict, DeadlinePassed, Internal, NoSpace, NotFound, Unavailable, VzfleetError
from common.failpoints import FailPoints, never
from common.messages import Progress
from common.states import Status
from common.tasks import Tasks
from controller.operations import machine
from controller.operations.kinds import Context, Kind, Resources, Step
from controller.operations.machine import Act, Decision, State
from controller.records import Operation, OperationError
from controller.store import containers
from controller.store import operations as rows
from controller.store.db import Database, Transaction

log = logging.getLogger(__name__)
UNDO_TIME = 60.0
ABANDON_TIME = 10.0
"""Seconds that a node has to say how a command ended which it was asked to give up."""
RETRY_DELAY = 1.0
Acknowledge = Callable[[str, list[str]], None]


@dataclass
class _Running:
    operation: Operation
    kind: Kind
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def show(self, operation: Operation) -> None:
        """What callers see from now on."""
        if self.cancelled.is_set() and not operation.status.final:
            operation = msgspec.structs.replace(operation, status=Status.CANCELLING)
        self.operation = operation


class Engine:
    """Runs all operations of the controller."""

    def __init__(
        self,
        store: Database,
        kinds: Mapping[str, Kind],
        resources: Resources,
        acknowledge: Acknowledge,
        failpoints: FailPoints = never,
    ) -> None:
        self._store = store
        self._kinds = kinds
        self._resources = resources
        self._acknowledge = acknowledge
        self._reach = failpoints
        self._running: dict[str, _Running] = {}
        self._tasks = Tasks("operations")

    def kind(self, name: str) -> Kind:
        """The kind of this name; KeyError is a programming error."""
        return self._kinds[name]

    def start(self, operation: Operation) -> None:
        """Begin with an operation whose row is committed."""
        running = _Running(operation, self._kinds[operation.kind])
        if operation.status is Status.CANCELLING:
            running.cancelled.set()
        self._running[operation.id] = running
        self._tasks.start(self._run(running), operation.id)

    async def resume(self) -> None:
        """Go on with all that had not ended when the controller did."""
        for operation in await self._store.read(rows.unfinished):
            if operation.kind not in self._kinds:
                log.error("an operation of an unknown kind is ended", extra={"operation": operation.id})
                await self._give_up(operation)
                continue
            log.info("operation resumed", extra={"operation": operation.id, "kind": operation.kind})
            self.start(operation)

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

    def live(self, operation: Operation) -> Operation:
        """The running state of an operation that was read from the store, if it runs."""
        running = self._running.get(operation.id)
        return operation if running is None else running.operation

    def over(self, command: str) -> bool:
        """Whether the operation of this command's id has ended, so that the node need not tell its result again."""
        return command.partition("/")[0] not in self._running

    def may_cancel(self, operation: Operation) -> bool:
        """Whether a cancel would be heard."""
        kind = self._kinds.get(operation.kind)
        return kind is not None and machine.may_cancel(kind.shape, _state_of(operation))

    async def wait(self, operation: str, timeout: float | None) -> Operation:
        """The operation once it has ended, or as it is after `timeout` seconds. Raises NotFound."""
        running = self._running.get(operation)
        if running is not None:
            try:
                async with asyncio.timeout(timeout):
                    await running.ended.wait()
            except TimeoutError:
                return running.operation
            return running.operation
        return await self.get(operation)

    async def cancel(self, operation: str) -> None:
        """Ask an operation to stop and undo what it did. Raises NotFound, or Conflict when it cannot be cancelled."""
        running = self._running.get(operation)
        if running is None:
            await self.get(operation)
            raise Conflict("the operation has ended already", field="operation")
        if not self.may_cancel(running.operation):
            raise Conflict("the operation is past the point where it can be cancelled", field="operation")
        # Heard before it is written: no step's record can then put another status over it.
        running.cancelled.set()
        running.show(running.operation)
        await self._store.write(lambda transaction: rows.mark_cancelling(transaction, operation))
        if running.operation.status in (Status.SUCCESS, Status.FAILURE):
            raise Conflict("the operation has ended already", field="operation")

    # ------------------------------------------------------------ one operation

    async def _run(self, running: _Running) -> None:
        try:
            await self._carry_out(running)
        finally:
            self._running.pop(running.operation.id, None)
            running.ended.set()

    async def _carry_out(self, running: _Running) -> None:
        kind = running.kind
        state = _state_of(running.operation)
        context = self._context(running)
        while (decision := machine.decide(kind.shape, state)).act is not Act.END:
            step = kind.steps[decision.step]
            context.place, context.step = f"{step.name}/{decision.act}", decision.step
            self._reach(f"{kind.name}/{context.place}/begin")
            if decision.act is Act.DO:
                state, output = await self._do(running, context, step, state)
            else:
                state, output = await self._undo(context, step, state, decision), None
            over = machine.decide(kind.shape, state).act is Act.END
            if over or state.undoing or output is not None or step.write is not None or context.answered:
                await self._record(running, context, step, state, output, over)
            else:
                # It found nothing to do, and would find that again after a restart: no commit for it.
                running.show(msgspec.structs.replace(running.operation, position=state.position))
                context.operation = running.operation
            self._reach(f"{kind.name}/{context.place}/done")
            if running.operation.status.final:
                break
        if not running.operation.status.final:
            await self._record(running, context, None, state, None, over=True)

    async def _do(self, running: _Running, context: Context, step: Step, state: State) -> tuple[State, Any]:
        interruptible = machine.may_cancel(running.kind.shape, state)
        try:
            return machine.done(state), await self._interruptible(running, context, step, interruptible)
        except VzfleetError as error:
            return machine.failed(state, error), None
        except Exception:
            log.exception("a step failed by a fault of ours", extra={"operation": context.operation.id})
            return machine.failed(state, Internal("a fault in the controller; its log says where")), None

    async def _interruptible(self, running: _Running, context: Context, step: Step, interruptible: bool) -> Any:
        now = self._resources.clock.monotonic()
        if not interruptible:
            # What cannot be taken back gets its time, even when a restart came after the deadline.
            context.deadline = max(context.deadline, now + UNDO_TIME)
            return await step.do(context)
        if running.cancelled.is_set():
            raise Cancelled("cancelled on request")
        if now >= context.deadline:
            raise DeadlinePassed("the operation's deadline has passed")
        task = asyncio.ensure_future(step.do(context))
        cancelled = asyncio.ensure_future(running.cancelled.wait())
        try:
            await asyncio.wait({task, cancelled}, timeout=context.deadline - now, return_when="FIRST_COMPLETED")
            if not task.done():
                await self._interrupt(running, context, task)
            return task.result()
        finally:
            for pending in (task, cancelled):
                pending.cancel()
            await asyncio.gather(task, cancelled, return_exceptions=True)

    async def _interrupt(self, running: _Running, context: Context, task: asyncio.Future[Any]) -> None:
        """Have a step's commands given up. Raises why it was interrupted, unless it is done all the same."""
        on_request = running.cancelled.is_set()
        if context.underway:
            context.abandon()
            await asyncio.wait({task}, timeout=ABANDON_TIME)
        if task.done() and task.exception() is None:
            return
        raise Cancelled("cancelled on request") if on_request else DeadlinePassed("the operation's deadline has passed")

    async def _undo(self, context: Context, step: Step, state: State, decision: Decision) -> State:
        if step.undo is None:
            return machine.undone(state, decision.step)
        context.deadline = self._resources.clock.monotonic() + UNDO_TIME
        try:
            await step.undo(context)
            return machine.undone(state, decision.step)
        except VzfleetError as error:
            return machine.undo_failed(state, error)
        except Exception:
            log.exception("an undo failed by a fault of ours", extra={"operation": context.operation.id})
            return machine.undo_failed(state, Internal("a fault in the controller; its log says where"))

    async def _record(
        self, running: _Running, context: Context, step: Step | None, state: State, output: Any, over: bool
    ) -> None:
        """Commit where the operation stands, with the rows that the step and the end write."""
        before = running.operation
        outputs = dict(before.outputs)
        if output is not None and step is not None:
            outputs[step.name] = output
        now = timestamp(self._resources.clock.now())
        status = machine.final_status(state) if over else state.status
        after = msgspec.structs.replace(
            before,
            status=Status.CANCELLING if not over and running.cancelled.is_set() else status,
            undoing=state.undoing,
            position=state.position,
            outputs=outputs,
            error=state.error,
            updated_at=now,
            ended_at=now if over else None,
            # How far it is says nothing once it has ended.
            metadata={key: value for key, value in before.metadata.items() if key != "progress"}
            if over
            else before.metadata,
        )

        def write(transaction: Transaction) -> None:
            if step is not None and step.write is not None and not state.undoing:
                step.write(transaction, after)
            if over:
                ending = running.kind.succeeded if status is Status.SUCCESS else running.kind.failed
                ending(transaction, after)
            rows.rows.replace(transaction, after)

        try:
            await self._commit(write)
        except VzfleetError:
            after = await self._give_up(before)
        context.operation = after
        running.show(after)
        for node, command in context.answered:
            self._acknowledge(node, [command])
        context.answered.clear()

    async def _commit(self, write: Callable[[Transaction], None]) -> None:
        """Commit, however long a full disk makes it take: what has happened must not be forgotten."""
        while True:
            try:
                await self._store.write(write)
                return
            except (NoSpace, Unavailable) as error:
                log.error("an operation's step could not be recorded, trying again", extra={"reason": error.text})
                await asyncio.sleep(RETRY_DELAY)

    async def _give_up(self, operation: Operation) -> Operation:
        """End an operation whose rows cannot be written, by a fault of ours; its containers are free again."""
        fault = OperationError(Internal.code, "what it did could not be recorded; the controller's log says why")
        now = timestamp(self._resources.clock.now())
        ended = msgspec.structs.replace(
            operation, status=Status.FAILURE, error=operation.error or fault, updated_at=now, ended_at=now
        )

        def write(transaction: Transaction) -> None:
            rows.rows.replace(transaction, ended)
            containers.give_up(transaction, ended)

        await self._commit(write)
        return ended

    def _context(self, running: _Running) -> Context:
        clock = self._resources.clock
        left = (datetime.fromisoformat(running.operation.deadline_at) - clock.now()).total_seconds()

        def report(stage: str, percent: int | None) -> None:
            note = {"stage": stage} if percent is None else {"stage": stage, "percent": percent}
            metadata = {**running.operation.metadata, "progress": note}
            running.operation = msgspec.structs.replace(running.operation, metadata=metadata)

        def progress(message: Progress) -> None:
            note = {key: value for key, value in msgspec.to_builtins(message).items() if key not in ("type", "command")}
            metadata = {**running.operation.metadata, "progress": note}
            running.operation = msgspec.structs.replace(running.operation, metadata=metadata)

        return Context(running.operation, self._resources, clock.monotonic() + left, report, progress)


def _state_of(operation: Operation) -> State:
    return State(operation.status, operation.undoing, operation.position, operation.error)
