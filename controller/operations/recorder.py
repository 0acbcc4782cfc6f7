"""Commits what operations did: where they stand, with the rows that their steps and ends write."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from common.clock import Clock, timestamp
from common.errors import Internal, NoSpace, Unavailable, VzfleetError
from common.states import Status
from controller.operations import machine
from controller.operations.kinds import Kind, Step
from controller.operations.machine import State
from controller.records import Operation, OperationError
from controller.store import containers
from controller.store import operations as rows
from controller.store.db import Database, Transaction

log = logging.getLogger(__name__)
RETRY_DELAY = 1.0


class Recorder:
    """Writes operations, however long a full disk makes it take: what has happened must not be forgotten."""

    def __init__(self, store: Database, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def record(
        self,
        kind: Kind,
        before: Operation,
        state: State,
        *,
        step: Step | None,
        output: Any,
        over: bool,
        cancelled: Callable[[], bool],
    ) -> Operation:
        """Commit an operation that was at `before` and now is at `state`, by `step` with its output if it has one.

        `over` says that it ends here. `cancelled` is asked at the moment of writing: a full disk may delay that until a
        cancel has come. Returns it as it is written: ended, if the rows refuse to be written.
        """
        after = self._advanced(before, state, over)
        if step is not None and output is not None:
            after = msgspec.structs.replace(after, outputs={**before.outputs, step.name: output})

        def write(transaction: Transaction) -> Operation:
            cancelling = cancelled() and not over
            written = msgspec.structs.replace(after, status=Status.CANCELLING) if cancelling else after
            if step is not None and step.write is not None and not state.undoing:
                step.write(transaction, written)
            if over:
                ending = kind.succeeded if written.status is Status.SUCCESS else kind.failed
                ending(transaction, written)
            return rows.rows.replace(transaction, written)

        try:
            return await self._commit(write)
        except VzfleetError:
            return await self.give_up(before)

    async def give_up(self, operation: Operation) -> Operation:
        """End an operation whose rows cannot be written, by a fault of ours; its containers are free again."""
        fault = OperationError(Internal.code, "what it did could not be recorded; the controller's log says why")
        now = timestamp(self._clock.now())
        ended = msgspec.structs.replace(
            operation, status=Status.FAILURE, error=operation.error or fault, updated_at=now, ended_at=now
        )

        def write(transaction: Transaction) -> Operation:
            rows.rows.replace(transaction, ended)
            containers.give_up(transaction, ended)
            return ended

        return await self._commit(write)

    def _advanced(self, before: Operation, state: State, over: bool) -> Operation:
        now = timestamp(self._clock.now())
        after = msgspec.structs.replace(
            before,
            status=state.status,
            undoing=state.undoing,
            position=state.position,
            error=state.error,
            updated_at=now,
        )
        if not over:
            return after
        # How far it is says nothing once it has ended.
        metadata = {key: value for key, value in before.metadata.items() if key != "progress"}
        return msgspec.structs.replace(after, status=machine.final_status(state), ended_at=now, metadata=metadata)

    async def _commit(self, write: Callable[[Transaction], Operation]) -> Operation:
        while True:
            try:
                return await self._store.write(write)
            except (NoSpace, Unavailable) as error:
                log.error("an operation's step could not be recorded, trying again", extra={"reason": error.text})
                await asyncio.sleep(RETRY_DELAY)
