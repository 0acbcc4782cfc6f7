"""One operation under way: asks the state machine, runs the step, has it recorded, until the end.

Every step is recorded before the next begins.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from common.errors import Abandoned, Cancelled, Conflict, DeadlinePassed, Internal, Unavailable, VzfleetError
from common.failpoints import FailPoints
from common.messages import Progress
from common.states import Status
from controller.operations import machine
from controller.operations.kinds import Context, Kind, Resources, Step
from controller.operations.machine import Act, Decision, State
from controller.operations.pace import Pace
from controller.operations.recorder import Recorder
from controller.operations.transfers import progress_of
from controller.records import Operation

log = logging.getLogger(__name__)
UNDO_TIME = 60.0
ABANDON_TIME = 10.0
"""Seconds that a node has to say how a command ended which it was asked to give up."""
Acknowledge = Callable[[str, list[str]], None]
Progressed = Callable[[Operation], None]
"""Hears of an operation that it is further within its step, once a second at most."""


class Execution:
    """Carries one operation out, from where its row says that it stands. `operation` is what callers see of it."""

    def __init__(
        self,
        operation: Operation,
        kind: Kind,
        resources: Resources,
        recorder: Recorder,
        acknowledge: Acknowledge,
        reach: FailPoints,
        progressed: Progressed,
        resumed: bool = False,
    ) -> None:
        """`acknowledge` tells a node that results of its commands are committed.

        `resumed`: an earlier life of the controller may have begun with later steps than the row says, since one that
        finds nothing to do is not recorded.
        """
        self.operation = operation
        self._kind = kind
        self._resources = resources
        self._recorder = recorder
        self._acknowledge = acknowledge
        self._reach = reach
        self._unseen = resumed
        self._pace = Pace(lambda: progressed(self.operation))
        self._context = self._new_context()
        self._cancelled = asyncio.Event()
        self._ended = asyncio.Event()
        if operation.status is Status.CANCELLING:
            self._cancelled.set()

    def cancel(self) -> None:
        """Have it stop at once and undo what it did, if it has not passed its point of no return."""
        self._cancelled.set()
        self._show(self.operation)

    def abandon(self) -> None:
        """Go on without the nodes that it waits for and that cannot be reached. Raises Conflict when there are none."""
        nodes = self._resources.fleet.nodes
        waited_for = {node for node, _ in self._context.underway.values()}
        lost = {node for node in waited_for if node not in nodes or not nodes[node].reachable}
        if not lost:
            raise Conflict(
                "the operation waits for no node that is out of reach", field="force", allowed="a cancel, without force"
            )
        self._context.lose(lost)

    def is_past(self, command: str) -> bool:
        """Whether the step of this command (`<operation>/<step>/<do or undo>`) is recorded; it may be no such id."""
        _, _, place = command.partition("/")
        name, _, act = place.partition("/")
        names = [step.name for step in self._kind.steps]
        if name not in names:
            return False
        at, stands = names.index(name), self.operation
        if act.startswith(Act.UNDO):
            return stands.undoing and at > stands.position
        return stands.undoing or at < stands.position

    async def wait(self, timeout: float | None) -> None:
        """Return when it has ended, or after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._ended.wait()
        except TimeoutError:
            return

    async def run(self) -> None:
        """Go on until it has ended."""
        try:
            await self._carry_out()
        finally:
            self._pace.close()
            self._ended.set()

    async def _carry_out(self) -> None:
        kind = self._kind
        state = State.of(self.operation)
        context = self._context
        while (decision := machine.decide(kind.shape, state)).act is not Act.END:
            step = kind.steps[decision.step]
            context.place, context.step = f"{step.name}/{decision.act}", decision.step
            context.again = self._unseen
            # On the way back, or behind the point of no return, nobody is helped by a refusal.
            context.patient = decision.act is Act.UNDO or 0 < kind.shape.no_return <= decision.step
            self._reach(f"{kind.name}/{context.place}/begin")
            if decision.act is Act.DO:
                state, output = await self._do(context, step, state)
            else:
                state, output = await self._undo(context, step, state, decision), None
            self._reach(f"{kind.name}/{context.place}/carried-out")
            over = machine.decide(kind.shape, state).act is Act.END
            if over or state.undoing or output is not None or step.write is not None or context.answered:
                await self._record(context, step, state, output, over)
            else:
                # It found nothing to do, and would find that again after a restart: no commit for it.
                self._show(msgspec.structs.replace(self.operation, position=state.position))
                context.operation = self.operation
            self._reach(f"{kind.name}/{context.place}/done")
            if self.operation.status.final:
                break
        if not self.operation.status.final:
            await self._record(context, None, state, None, over=True)

    # ------------------------------------------------------------ one step

    async def _do(self, context: Context, step: Step, state: State) -> tuple[State, Any]:
        interruptible = machine.may_cancel(self._kind.shape, state)
        try:
            output = await (self._interruptible(context, step) if interruptible else self._to_its_end(context, step))
            return machine.done(state), output
        except VzfleetError as error:
            return self._failed(state, error), None
        except Exception:
            log.exception("a step failed by a fault of ours", extra={"operation": context.operation.id})
            return self._failed(state, Internal("a fault in the controller; its log says where")), None

    def _failed(self, state: State, error: VzfleetError) -> State:
        if isinstance(error, Cancelled) and not self._cancelled.is_set():
            # A node gave it up of its own accord, as one end of a transfer does when the other is lost.
            error = Unavailable(error.text)
        failed = machine.failed(state, error)
        return machine.from_the_furthest(self._kind.shape, failed) if self._unseen else failed

    async def _to_its_end(self, context: Context, step: Step) -> Any:
        """What cannot be taken back gets its time, even when a restart came after the deadline."""
        context.deadline = max(context.deadline, self._resources.clock.monotonic() + UNDO_TIME)
        return await step.do(context)

    async def _interruptible(self, context: Context, step: Step) -> Any:
        if self._cancelled.is_set():
            raise Cancelled("cancelled on request")
        now = self._resources.clock.monotonic()
        if now >= context.deadline:
            raise DeadlinePassed("the operation's deadline has passed")
        task = asyncio.ensure_future(step.do(context))
        cancelled = asyncio.ensure_future(self._cancelled.wait())
        try:
            await asyncio.wait({task, cancelled}, timeout=context.deadline - now, return_when="FIRST_COMPLETED")
            if not task.done():
                await self._interrupt(context, task)
            return task.result()
        finally:
            for pending in (task, cancelled):
                pending.cancel()
            await asyncio.gather(task, cancelled, return_exceptions=True)

    async def _interrupt(self, context: Context, task: asyncio.Future[Any]) -> None:
        """Have a step's commands given up. Raises why it was interrupted, unless it is done all the same."""
        on_request = self._cancelled.is_set()
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
        except Abandoned:
            # What is left there is shown when the node is back; what can be undone elsewhere still is.
            return machine.undone(state, decision.step)
        except VzfleetError as error:
            return machine.undo_failed(state, error)
        except Exception:
            log.exception("an undo failed by a fault of ours", extra={"operation": context.operation.id})
            return machine.undo_failed(state, Internal("a fault in the controller; its log says where"))

    # ------------------------------------------------------------ what is kept and shown of it

    async def _record(self, context: Context, step: Step | None, state: State, output: Any, over: bool) -> None:
        """Commit where it stands, then let the nodes forget the results that led there."""
        if over:
            self._pace.close()
        context.operation = await self._recorder.record(
            self._kind, self.operation, state, step=step, output=output, over=over, cancelled=self._cancelled.is_set
        )
        self._unseen = False
        self._show(context.operation)
        for node, command in context.answered:
            self._acknowledge(node, [command])
        context.answered.clear()

    def _show(self, operation: Operation) -> None:
        if self._cancelled.is_set() and not operation.status.final:
            operation = msgspec.structs.replace(operation, status=Status.CANCELLING)
        self.operation = operation

    def _tell(self, facts: dict[str, Any]) -> None:
        self.operation = msgspec.structs.replace(self.operation, metadata={**self.operation.metadata, **facts})

    def _show_progress(self, note: dict[str, Any]) -> None:
        metadata = {**self.operation.metadata, "progress": note}
        self.operation = msgspec.structs.replace(self.operation, metadata=metadata)
        self._pace.new()

    def _new_context(self) -> Context:
        clock = self._resources.clock
        ends, made = (datetime.fromisoformat(at) for at in (self.operation.deadline_at, self.operation.created_at))
        # A clock that was set back gives no more time than there was.
        left = min(ends - clock.now(), ends - made).total_seconds()

        def report(stage: str, percent: int | None) -> None:
            self._show_progress({"stage": stage} if percent is None else {"stage": stage, "percent": percent})

        def progress(message: Progress) -> None:
            known = {key: value for key, value in progress_of(message).items() if value is not None}
            self._show_progress(known)

        deadline = clock.monotonic() + left
        return Context(self.operation, self._resources, deadline, report, progress, self._tell, self._show_progress)
