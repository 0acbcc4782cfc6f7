"""Snapshots of containers: taken on request and by schedule, renamed, kept longer, restored, deleted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import msgspec
from msgspec import UNSET, Struct

from common.clock import Clock, timestamp
from common.errors import Conflict, InvalidRequest, NotFound
from common.names import check_snapshot_name
from common.snapshots import expiry_of, given_expiry, name_of
from common.states import Status
from controller.identifiers import moment_id
from controller.live import LiveContainer
from controller.operations.snapshots import RenameParameters, SnapshotParameters, UpdateParameters
from controller.records import Container, Operation, Snapshot
from controller.services.caller import Caller
from controller.services.containers import Containers
from controller.services.requests import SnapshotBody, SnapshotRenameBody, SnapshotUpdateBody
from controller.services.revisions import digest, require_match
from controller.store import containers as rows
from controller.store import operations as operation_rows
from controller.store.db import Transaction

EXPIRY, PATTERN = "snapshots.expiry", "snapshots.pattern"
DONE = "moment"
"""Field of the Conflict that refuses a second snapshot for one moment of a schedule."""


def etag_of(snapshot: Snapshot) -> str:
    """A hash of what can be written (R10), unquoted."""
    return digest([snapshot.expires_at])


class Snapshots:
    """Accepts what is asked of snapshots."""

    def __init__(self, containers: Containers, clock: Clock) -> None:
        self._containers = containers
        self._clock = clock

    def require(self, container: str, name: str, field: str = "name") -> Snapshot:
        """The container's snapshot. Raises NotFound."""
        found = self._containers.get(container).snapshots.get(name)
        if found is None:
            raise _missing(container, name, field)
        return found

    # ------------------------------------------------------------ taking

    async def take(self, caller: Caller, container: str, body: SnapshotBody) -> Operation:
        """Accept a snapshot. Raises NotFound, InvalidRequest, Conflict (the name is taken), Busy, Unavailable."""
        live = self._ready(container)
        if body.stateful:
            raise InvalidRequest("the memory of a container is not kept", field="stateful", allowed="false")
        if body.name is not None and check_snapshot_name(body.name) in live.snapshots:
            raise _taken(container, body.name)
        self._check_future(given_expiry(body.expires_at), None)

        def expires(record: Container) -> datetime | None:
            if body.expires_at is not None:
                return given_expiry(body.expires_at)
            return self._expiry(record)

        return await self._take(caller, live, body.name, expires)

    async def take_scheduled(self, caller: Caller, container: str, moment: datetime) -> Operation:
        """Accept the one snapshot for a moment of its schedule.

        Raises Conflict of the field `DONE` when there was one already; and what `take` raises.
        """
        return await self._take(caller, self._ready(container), None, self._expiry, moment)

    async def _take(
        self,
        caller: Caller,
        live: LiveContainer,
        name: str | None,
        expires: Callable[[Container], datetime | None],
        moment: datetime | None = None,
    ) -> Operation:
        running = self._is_running(live)

        def prepare(transaction: Transaction) -> Operation:
            identity = None if moment is None else _identity(transaction, live.record.id, moment)
            record = rows.require_ready(transaction, live.record.id)
            called = self._name(transaction, record, name)
            expiry = expires(record)
            parameters = SnapshotParameters(
                record.id,
                record.node,
                record.generation,
                called,
                record.config,
                running,
                None if expiry is None else timestamp(expiry),
                moment is not None,
            )
            operation = self._draft(caller, "snapshot.create", record, called, parameters)
            if moment is not None and identity is not None:
                metadata = {**operation.metadata, "moment": timestamp(moment)}
                operation = msgspec.structs.replace(operation, id=identity, metadata=metadata)
            return self._hold(transaction, record, operation)

        return await self._containers.operations.accept(prepare)

    def _name(self, transaction: Transaction, record: Container, name: str | None) -> str:
        taken = {snapshot.name for snapshot in rows.all_snapshots(transaction.connection, record.id)}
        if name is None:
            name = name_of(record.config.get(PATTERN, ""), self._clock.now(), taken, f"config.{PATTERN}")
        if name in taken:
            raise _taken(record.id, name)
        return name

    def _expiry(self, record: Container) -> datetime | None:
        return expiry_of(record.config.get(EXPIRY, ""), self._clock.now(), f"config.{EXPIRY}")

    def _check_future(self, expiry: datetime | None, present: str | None) -> None:
        """Raise InvalidRequest for a time that has passed, unless it is the present one."""
        if expiry is not None and expiry <= self._clock.now() and timestamp(expiry) != present:
            raise InvalidRequest(
                "it would have expired already", field="expires_at", allowed="a time to come, or null for never"
            )

    # ------------------------------------------------------------ changing

    async def update(
        self, caller: Caller, container: str, name: str, body: SnapshotUpdateBody, expected: str | None
    ) -> Operation:
        """Accept another expiry, also while the node is out of reach.

        Raises NotFound, InvalidRequest, PreconditionFailed (If-Match), Busy.
        """
        present = self.require(container, name)
        require_match(etag_of(present), expected, "snapshot")
        expiry = present.expires_at
        if body.expires_at is not UNSET:
            given = given_expiry(body.expires_at)
            self._check_future(given, present.expires_at)
            expiry = None if given is None else timestamp(given)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            stored = _stored(transaction, container, name)
            require_match(etag_of(stored), expected, "snapshot")
            parameters = UpdateParameters(container, name, stored.expires_at if body.expires_at is UNSET else expiry)
            return self._hold(transaction, record, self._draft(caller, "snapshot.update", record, name, parameters))

        return await self._containers.operations.accept(prepare)

    async def rename(self, caller: Caller, container: str, name: str, body: SnapshotRenameBody) -> Operation:
        """Accept another name. Raises NotFound, InvalidRequest, Conflict (it is taken), Busy, Unavailable."""
        live = self._ready(container)
        self.require(container, name)
        new = check_snapshot_name(body.name)
        if new in live.snapshots:
            raise _taken(container, new)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            names = {snapshot.name for snapshot in rows.all_snapshots(transaction.connection, container)}
            if name not in names:
                raise _missing(container, name)
            if new in names:
                raise _taken(container, new)
            parameters = RenameParameters(container, record.node, record.generation, name, new)
            return self._hold(transaction, record, self._draft(caller, "snapshot.rename", record, new, parameters))

        return await self._containers.operations.accept(prepare)

    # ------------------------------------------------------------ restoring and deleting

    async def delete(self, caller: Caller, container: str, name: str) -> Operation:
        """Accept a deletion of a snapshot. Raises NotFound, Busy, Unavailable."""
        return await self._work_on(caller, "snapshot.delete", container, name)

    async def restore(self, caller: Caller, container: str, name: str) -> Operation:
        """Accept a restore; a running container is stopped for it and started again. Raises NotFound, Busy."""
        # LXD's clients name it "container/snapshot" or by its bare name.
        own = name.removeprefix(f"{container}/")
        return await self._work_on(caller, "snapshot.restore", container, own, "restore")

    async def _work_on(self, caller: Caller, kind: str, container: str, name: str, field: str = "name") -> Operation:
        running = self._is_running(self._ready(container))
        self.require(container, name, field)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            _stored(transaction, container, name)
            parameters = SnapshotParameters(container, record.node, record.generation, name, record.config, running)
            return self._hold(transaction, record, self._draft(caller, kind, record, name, parameters))

        return await self._containers.operations.accept(prepare)

    # ------------------------------------------------------------ what they share

    def _draft(self, caller: Caller, kind: str, record: Container, name: str, parameters: Struct) -> Operation:
        url = f"/1.0/vz/{record.id}"
        resources = {"containers": [url], "snapshots": [f"{url}/snapshots/{name}"]}
        return self._containers.operations.draft(
            caller, kind, containers=(record.id,), node=record.node, parameters=parameters, resources=resources
        )

    @staticmethod
    def _hold(transaction: Transaction, record: Container, operation: Operation) -> Operation:
        rows.rows.replace(transaction, msgspec.structs.replace(record, operation=operation.id))
        return operation

    def _is_running(self, live: LiveContainer) -> bool:
        return self._containers.fleet.status_of(live).status in (Status.RUNNING, Status.FROZEN)

    def _ready(self, container: str) -> LiveContainer:
        live = self._containers.get(container)
        self._containers.require_whole(live.record)
        self._containers.nodes.require_reachable(live.record.node)
        return live


def _identity(transaction: Transaction, container: str, moment: datetime) -> str:
    """The id of the one operation for this moment. Raises Conflict when there is one already, under way or ended."""
    # The hardware address stays with a container through renames and moves, and no other one has it.
    identity = moment_id(moment, rows.require(transaction, container).hwaddr)
    if operation_rows.rows.get(transaction.connection, identity) is not None:
        raise Conflict(f"the snapshot of {container} for {moment:%Y-%m-%dT%H:%MZ} was begun already", field=DONE)
    return identity


def _stored(transaction: Transaction, container: str, name: str) -> Snapshot:
    for snapshot in rows.all_snapshots(transaction.connection, container):
        if snapshot.name == name:
            return snapshot
    raise _missing(container, name)


def _missing(container: str, name: str, field: str = "name") -> NotFound:
    return NotFound(f"container {container} has no snapshot {name[:64]}", field=field)


def _taken(container: str, name: str) -> Conflict:
    return Conflict(f"container {container} has a snapshot {name} already", field="name")
