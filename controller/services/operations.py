"""Accepting operations, and showing, waiting for and cancelling them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
from msgspec import Struct

from common.clock import Clock, timestamp
from common.states import Status
from controller.identifiers import operation_id
from controller.operations.engine import Engine
from controller.records import Operation
from controller.services.caller import Caller
from controller.services.promises import Promises
from controller.store import operations as rows
from controller.store.db import Database, Transaction


class Operations:
    """Every 202 of the API comes from `accept`."""

    def __init__(self, store: Database, engine: Engine, promises: Promises, clock: Clock) -> None:
        self._store = store
        self._engine = engine
        self._promises = promises
        self._clock = clock

    def draft(
        self,
        caller: Caller,
        kind: str,
        *,
        containers: tuple[str, ...],
        node: str | None,
        parameters: Struct,
        resources: dict[str, list[str]] | None = None,
        extra_time: float = 0.0,
        metadata: dict[str, Any] | None = None,
    ) -> Operation:
        """An operation not yet written; `extra_time` in seconds is added to what its kind may take."""
        now = self._clock.now()
        limit = timedelta(seconds=self._engine.kind(kind).timeout + extra_time)
        return Operation(
            id=operation_id(),
            kind=kind,
            status=Status.RUNNING,
            created_at=timestamp(now),
            updated_at=timestamp(now),
            deadline_at=timestamp(now + limit),
            containers=containers,
            node=node,
            requestor=caller.requestor,
            request=caller.request,
            parameters=msgspec.to_builtins(parameters),
            resources=resources or {"containers": [f"/1.0/vz/{container}" for container in containers]},
            metadata=metadata or {},
        )

    async def accept(self, prepare: Callable[[Transaction], Operation]) -> Operation:
        """Write an operation with all its rows in one transaction, and begin with it once that is durable.

        `prepare` checks the request against the rows and raises what refuses it; then nothing has happened.
        """

        def write(transaction: Transaction) -> Operation:
            operation = prepare(transaction)
            rows.add(transaction, operation)
            self._promises.accepted(transaction, operation)
            return operation

        operation = await self._store.write(write)
        self._engine.start(operation)
        return operation

    async def get(self, operation: str) -> Operation:
        """One operation. Raises NotFound."""
        return await self._engine.get(operation)

    def under_way(self, operation: str) -> Operation | None:
        """One operation with its progress, if it has not ended."""
        return self._engine.under_way(operation)

    async def wait(self, operation: str, timeout: float | None) -> Operation:
        """One operation once it has ended, or as it is after `timeout` seconds. Raises NotFound."""
        return await self._engine.wait(operation, timeout)

    async def cancel(self, operation: str) -> None:
        """Stop it and undo what it did. Raises NotFound or Conflict."""
        await self._engine.cancel(operation)

    async def abandon(self, operation: str) -> None:
        """End it without the nodes that it waits for in vain. Raises NotFound, or Conflict when it waits for none."""
        await self._engine.abandon(operation)

    def may_cancel(self, operation: Operation) -> bool:
        """Whether a cancel would be heard."""
        return not operation.status.final and self._engine.may_cancel(operation)

    def description(self, operation: Operation) -> str:
        """What it does, in words; of a kind that is no longer known, its name."""
        return self._engine.description(operation.kind)

    async def find(
        self,
        *,
        container: str | None,
        node: str | None,
        status: Status | None,
        limit: int,
        before: str | None,
    ) -> list[Operation]:
        """The newest operations that match, newest first, with their progress."""
        found = await self._store.read(
            lambda connection: rows.find(
                connection, container=container, node=node, status=status, limit=limit, before=before
            )
        )
        return [self._engine.live(operation) for operation in found]
