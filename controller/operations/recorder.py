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
        cancelled: bool,
    ) -> Operation:
        """Commit an operation that was at `before` and now is at `state`, by `step` with its output if it has one.

        `over` says that it ends here. Returns it as it is written: ended, if the rows refuse to be written.
        """
        after = self._advanced(before, state, over)
        if step is not None and output is not None:
            after = msgspec.structs.replace(after, outputs={**before.outputs, step.name: output})
        if cancelled and not over:
            after = msgspec.structs.replace(after, status=Status.CANCELLING)

        def write(transaction: Transaction) -> None:
            if step is not None and step.write is not None and not state.undoing:
                step.write(transaction, after)
            if over:
                ending = kind.succeeded if after.status is Status.SUCCESS else kind.failed
                ending(transaction, after)
            rows.rows.replace(transaction, after)

        try:
            await self._commit(write)
        except VzfleetError:
            return await self.give_up(before)
        return after

    async def give_up(self, operation: Operation) -> Operation:
        """End an operation whose rows cannot be written, by a fault of ours; its containers are free again."""
        fault = OperationError(Internal.code, "what it did could not be recorded; the controller's log says why")
        now = timestamp(self._clock.now())
        ended = msgspec.structs.replace(
            operation, status=Status.FAILURE, error=operation.error or fault, updated_at=now, ended_at=now
        )

        def write(transaction: Transaction) -> None:
            rows.rows.replace(transaction, ended)
            containers.give_up(transaction, ended)

        await self._commit(write)
        return ended

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

    async def _commit(self, write: Callable[[Transaction], None]) -> None:
        while True:
            try:
                await self._store.write(write)
                return
            except (NoSpace, Unavailable) as error:
                log.error("an operation's step could not be recorded, trying again", extra={"reason": error.text})
                await asyncio.sleep(RETRY_DELAY)
