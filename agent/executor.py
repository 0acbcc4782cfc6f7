"""From a command to its result: admitted, journalled, run under its container's lock, finished in the journal, told."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

import msgspec

from agent.admission import Answer, Fences, Refuse, containers_of, decide, outdated
from agent.checks import check_arguments
from agent.context import current_command, current_request
from agent.handlers import HANDLERS, Done, Node
from agent.journal import Journal
from agent.locks import KeyedLocks
from agent.progress import ProgressReporter
from common.clock import Clock
from common.commands import COMMANDS, StopContainer, TimeoutClass
from common.errors import Cancelled, DeadlinePassed, Internal, NoSpace, NotFound, Stale, Unavailable, VzfleetError
from common.failpoints import FailPoints, never
from common.messages import Accepted, AgentMessage, Command, Result, StateChanged
from common.reports import ContainerReport, WireError
from common.states import Status
from common.tasks import Tasks

log = logging.getLogger(__name__)
PARALLEL = 16
BOUNDARIES = ("received", "begun", "done", "finished", "told")
"""Where a test can make the agent fail at a command: before and after it stands in the journal, after the driver, after
its result stands in the journal, after that is on its way. The point is `agent/<step>/<do or undo>/<boundary>`."""
MAX_TEXT = 2000
MOST_REFUSED = 10_000


class Executor:
    """Carries out commands. `send` gives a message to the link; a command runs on when its session has ended."""

    def __init__(
        self,
        node: Node,
        journal: Journal,
        clock: Clock,
        send: Callable[[AgentMessage], None],
        *,
        parallel: int = PARALLEL,
        failpoints: FailPoints = never,
    ) -> None:
        self._node = node
        self._journal = journal
        self._clock = clock
        self._send = send
        self._failpoints = failpoints
        self._session = ""
        self._tasks = Tasks("executor")
        self._running: dict[str, bool] = {}
        """The ids of commands under way; True once they stand in the journal."""
        self._refused: dict[str, Result] = {}
        """Commands of this session that will never run: their operations may have gone on, whatever comes of them."""
        self._abandoned: set[str] = set()
        self._work: dict[str, asyncio.Task[Done]] = {}
        self._locks = KeyedLocks()
        # Long transfers must not keep quick commands waiting, so they have slots of their own.
        self._quick = asyncio.Semaphore(parallel)
        self._slow = asyncio.Semaphore(parallel)

    async def begin_session(self, session: str, epoch: int) -> None:
        """Commands of this session count from now on; what was finished and not acknowledged is told again."""
        self._session = session
        self._refused.clear()
        if epoch < self._journal.epoch:
            log.error("the controller's epoch went back", extra={"epoch": epoch, "seen": self._journal.epoch})
        try:
            await self._journal.see_epoch(epoch)
        except (NoSpace, Unavailable) as error:
            # The node stays in reach: each command is answered with the same reason.
            log.error("the epoch cannot be kept", extra={"reason": error.text})
        for result in await self._journal.unacknowledged():
            self._send(_of_before(result))

    def end_session(self) -> None:
        """No command is accepted until the next session begins."""
        self._session = ""

    def receive(self, command: Command) -> None:
        """Take a command in; everything else happens in the background."""
        if command.id in self._running:
            if self._running[command.id]:
                self._send(Accepted(command.id))
            return
        if command.id in self._refused:
            self._send(self._refused[command.id])
            return
        self._running[command.id] = False
        self._tasks.start(self._handle(command), command.id)

    def abandon(self, command: str) -> None:
        """Give a command up; one that has not come yet, or is over, is answered with what is known of it."""
        if command in self._running:
            self._abandoned.add(command)
            work = self._work.get(command)
            if work is not None:
                work.cancel()
            return
        # A copy of it that comes meanwhile does not begin.
        self._running[command] = False
        self._tasks.start(self._give_up(command), "abandon")

    async def _give_up(self, command: str) -> None:
        try:
            await self._tell_again(command)
        finally:
            del self._running[command]
            self._abandoned.discard(command)

    async def _tell_again(self, command: str) -> None:
        record = await self._journal.find(command)
        if record is not None and record.result is not None:
            self._send(_of_before(record.result))
            return
        given_up = Result(command, error=_wire(Cancelled("the command was given up, it does not run")))
        if record is not None:
            # Begun before a restart: from now on it is answered, should it come again.
            await self._finish(given_up)
        self._refuse(given_up)

    def _refuse(self, refusal: Result) -> None:
        """Tell that a command does not run, and keep to that when a copy of it comes late in this session."""
        self._refused[refusal.command] = refusal
        if len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]
        self._send(refusal)

    def acknowledged(self, commands: tuple[str, ...]) -> None:
        """The controller has these results."""
        self._tasks.start(self._acknowledge(commands), "acknowledge")

    def hold(self, container: str) -> AbstractAsyncContextManager[None]:
        """The lock of a container, for work on it which no command asked for."""
        return self._locks.hold(container)

    async def close(self) -> None:
        """Cancel what runs; it stays begun in the journal and is done again when it is delivered again."""
        await self._tasks.close()

    async def _acknowledge(self, commands: tuple[str, ...]) -> None:
        try:
            await self._journal.acknowledge(commands)
        except (NoSpace, Unavailable) as error:
            log.error("acknowledgements cannot be kept: the results are sent again", extra={"reason": error.text})

    async def _handle(self, command: Command) -> None:
        current_command.set(command.id)
        current_request.set(command.request)
        try:
            await self._admit_and_run(command)
        except VzfleetError as error:
            # Refused, or the journal cannot be used: either way the driver was not touched.
            log.warning("a command is refused", extra={"error": error.text})
            refusal = Result(command.id, error=_wire(error))
            if isinstance(error, Stale):
                # Of an earlier session, or late: the controller sends it again, and then it may run.
                self._send(refusal)
            else:
                self._refuse(refusal)
        finally:
            del self._running[command.id]
            self._abandoned.discard(command.id)

    async def _admit_and_run(self, command: Command) -> None:
        record = await self._journal.find(command.id)
        decision = decide(command, record, self._fences(), self._clock.monotonic())
        if isinstance(decision, Answer):
            self._send(_of_before(decision.result))
            return
        if isinstance(decision, Refuse):
            raise decision.error
        self._reach(command, "received")
        await self._journal.begin(command)
        self._reach(command, "begun")
        self._running[command.id] = True
        self._send(Accepted(command.id))
        log.info("a command begins", extra={"name_of_command": _name(command), "again": decision.again})
        result = await self._in_turn(command)
        await self._finish(result)
        self._reach(command, "finished")
        self._send(result)
        self._reach(command, "told")

    async def _in_turn(self, command: Command) -> Result:
        async with self._locks.hold(*containers_of(command)), self._slot(command):
            refusal = outdated(command, self._fences())
            result = Result(command.id, error=_wire(refusal)) if refusal else await self._carry_out(command)
            if result.error is not None and refusal is None:
                await self._tell_state(command)
            self._reach(command, "done")
            return result

    async def _tell_state(self, command: Command) -> None:
        """What is there after a command that failed: it may have had its effect all the same, or a part of it."""
        for container in containers_of(command):
            try:
                self._send(StateChanged(await self._node.driver.inspect(container)))
            except NotFound:
                gone = ContainerReport(container, command.generation, Status.STOPPED)
                self._send(StateChanged(gone, removed=True))
            except (VzfleetError, OSError) as error:
                log.warning("what a failed command left cannot be told", extra={"error": str(error)})

    def _reach(self, command: Command, boundary: str) -> None:
        self._failpoints(f"agent/{command.id.partition('/')[2]}/{boundary}")

    async def _carry_out(self, command: Command) -> Result:
        report = ProgressReporter(command.id, self._clock, self._send)
        try:
            check_arguments(command.arguments)
            async with asyncio.timeout(allowed_time(command)):
                outcome, sampled_at = await self._work_on(command, report)
        except TimeoutError:
            late = DeadlinePassed(f"{_name(command)} did not end within {allowed_time(command):g} s")
            return Result(command.id, error=_wire(late))
        except VzfleetError as error:
            log.info("a command failed", extra={"code": error.code, "error": error.text})
            return Result(command.id, error=_wire(error))
        # Whatever a driver trips over ends this command alone, and the controller must hear of it.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return Result(command.id, error=_wire(NoSpace("there is no room left on the node's disk")))
            log.exception("a command met a fault")
            return Result(command.id, error=_wire(Internal("the agent met a fault; its log tells more")))
        return Result(command.id, outcome=outcome, sampled_at=sampled_at)

    async def _work_on(self, command: Command, report: ProgressReporter) -> Done:
        """Run the handler in a task of its own, which `abandon` can end without ending the command's bookkeeping."""
        if command.id in self._abandoned:
            raise Cancelled("the command was given up before it began")
        handler = HANDLERS[type(command.arguments)](self._node, command.arguments, report)
        work = self._work[command.id] = asyncio.ensure_future(handler)
        try:
            return await work
        except asyncio.CancelledError:
            if command.id in self._abandoned and work.cancelled():
                raise Cancelled(f"{_name(command)} was given up") from None
            raise
        finally:
            del self._work[command.id]

    async def _finish(self, result: Result) -> None:
        """Keep the result; while the disk fails, try again, because it must not be told before it is kept."""
        while True:
            try:
                await self._journal.finish(result)
                return
            except (NoSpace, Unavailable) as error:
                log.error("the result cannot be kept", extra={"reason": error.text})
                await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311 jitter

    def _fences(self) -> Fences:
        return Fences(self._session, self._journal.epoch, self._journal.generations)

    def _slot(self, command: Command) -> AbstractAsyncContextManager[object | None]:
        if not containers_of(command):
            return nullcontext()  # images wait for each other on their own
        slow = COMMANDS[type(command.arguments)].timeout in (TimeoutClass.SLOW, TimeoutClass.TRANSFER)
        return self._slow if slow else self._quick


def allowed_time(command: Command) -> float:
    """Seconds which a command may take once begun."""
    own = command.arguments.timeout if isinstance(command.arguments, StopContainer) else 0.0
    return COMMANDS[type(command.arguments)].timeout.value + own


def _name(command: Command) -> str:
    return COMMANDS[type(command.arguments)].name


def _of_before(result: Result) -> Result:
    """A result that is told again: how its command ended, without what was there then. The inventory is newer."""
    if result.outcome is None:
        return result
    outcome = msgspec.structs.replace(result.outcome, container=None, sample=None)
    return msgspec.structs.replace(result, outcome=outcome, sampled_at=None)


def _wire(error: VzfleetError) -> WireError:
    """An error as it crosses the wire, cut to what a message may hold."""
    allowed = error.allowed[:MAX_TEXT] if error.allowed is not None else None
    field = error.field[:MAX_TEXT] if error.field is not None else None
    return WireError(error.code, error.text[:MAX_TEXT], field, allowed)
