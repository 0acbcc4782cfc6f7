"""Changing containers where they are: configuration, hostname, id; and deleting them."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from common.errors import Conflict, Fenced, InvalidRequest, NoPlacement, Unavailable
from common.names import check_container_id, check_hostname
from common.options import parse_config
from common.reports import ContainerSpec
from controller import placement
from controller.operations.containers import ChangeParameters, DeleteParameters
from controller.records import Container, Operation, Phase
from controller.services.caller import Caller
from controller.services.configuration import check_config
from controller.services.containers import Containers, check_description, spec_of, wanted_of
from controller.services.fencing import require_fenced
from controller.services.journeys import check_shape
from controller.services.present_use import check_limits
from controller.services.requests import RenameBody, UpdateBody
from controller.services.revisions import digest, require_match
from controller.store import containers as rows
from controller.store.db import Transaction


def etag_of(record: Container) -> str:
    """A hash of what can be written and of nothing that changes by itself (R8, R9), unquoted."""
    written = [record.hostname, record.description, sorted(record.config.items())]
    return digest(written)


def check_match(record: Container, expected: str | None) -> None:
    """Raise PreconditionFailed unless `expected` (an If-Match header, quoted or not) names the record's ETag."""
    require_match(etag_of(record), expected, "container")


def check_rename(body: RenameBody) -> None:
    """Raise InvalidRequest for a body that asks for nothing, or for another node without `migration`."""
    check_shape(body)
    if body.hostname is None and body.name is None and body.node is None:
        raise InvalidRequest(
            "nothing to be done", field="source", allowed="source (to create), or hostname, name, or node"
        )
    if body.node is not None and not body.migration:
        raise InvalidRequest("a move says migration: true", field="migration", allowed="true")


class Changes:
    """Changes to containers that exist and stay on their node."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers

    async def update(self, caller: Caller, container: str, body: UpdateBody, expected: str | None) -> Operation:
        """Accept a new configuration. Raises InvalidRequest, NotFound, PreconditionFailed, Busy, NoPlacement."""
        live = self._containers.get(container)
        check_match(live.record, expected)
        if body.hostname is not UNSET and body.hostname != live.record.hostname:
            raise InvalidRequest(
                "PUT does not change the hostname",
                field="hostname",
                allowed=f"{live.record.hostname!r}; POST with a hostname renames",
            )
        check_config(body.config)
        description = None if body.description is UNSET else check_description(body.description)
        self._containers.require_whole(live.record)
        node = self._containers.nodes.require_reachable(live.record.node).record.name
        check_limits(
            live, parse_config(live.record.config), parse_config(body.config), self._containers.nodes.memory_of(node)
        )

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            check_match(record, expected)
            self._check_kind(record, body.config)
            new = msgspec.structs.replace(spec_of(record), config=body.config)
            text = record.description if description is None else description
            return self._change(transaction, caller, "container.update", record, new, text)

        return await self._containers.operations.accept(prepare)

    async def rename(self, caller: Caller, container: str, body: RenameBody) -> Operation:
        """Accept another hostname or id. Raises what `update` raises, and Conflict."""
        live = self._containers.get(container)
        check_rename(body)
        name = check_container_id(body.name, "name") if body.name is not None else container
        hostname = check_hostname(body.hostname) if body.hostname is not None else None
        self._containers.require_whole(live.record)
        self._containers.nodes.require_reachable(live.record.node)
        if name != container:
            self._require_stopped(container, "its id can be changed")

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            if name != container:
                self._containers.free_id(transaction, name, "name")
                if self._containers.nodes.has_unmanaged(record.node, name):
                    raise Conflict(f"an unmanaged container on node {record.node} has the id {name}", field="name")
            new = msgspec.structs.replace(spec_of(record), id=name, hostname=hostname or record.hostname)
            return self._change(transaction, caller, "container.rename", record, new, record.description)

        return await self._containers.operations.accept(prepare)

    def _change(
        self,
        transaction: Transaction,
        caller: Caller,
        kind: str,
        record: Container,
        new: ContainerSpec,
        description: str,
    ) -> Operation:
        old_reserved = (record.reserved_memory, record.reserved_disk)
        new_reserved = self._containers.reservation(new.config, record.node)
        self._check_capacity(transaction, record, new)
        parameters = ChangeParameters(record.node, spec_of(record), new, description, old_reserved, new_reserved)
        ids = (record.id,) if new.id == record.id else (record.id, new.id)
        operation = self._containers.operations.draft(
            caller, kind, containers=ids, node=record.node, parameters=parameters
        )
        # Both the old and the new limits are held until it is known which of them holds.
        held = msgspec.structs.replace(
            record,
            operation=operation.id,
            reserved_memory=max(old_reserved[0], new_reserved[0]),
            reserved_disk=max(old_reserved[1], new_reserved[1]),
        )
        rows.rows.replace(transaction, held)
        return operation

    def _check_capacity(self, transaction: Transaction, record: Container, new: ContainerSpec) -> None:
        """Raise NoPlacement for limits that its node cannot hold."""
        reason = placement.shortage(
            self._containers.nodes.state(record.node, rows.reserved_by_node(transaction), record.id),
            wanted_of(parse_config(new.config), record.node),
            self._containers.nodes.policy,
            held_memory=record.reserved_memory,
            held_disk=record.reserved_disk,
        )
        if reason is not None:
            raise NoPlacement(
                f"node {record.node} cannot hold that: {reason}",
                field="config",
                details={"nodes": {record.node: reason}},
            )

    # ------------------------------------------------------------ deleting

    async def delete(self, caller: Caller, container: str, force: bool) -> Operation:
        """Accept a deletion. Raises NotFound, InvalidRequest (it runs, no `force`), Busy, Unavailable.

        With `force` a failed creation, and a container of a fenced node, can be deleted without the node: what is left
        there shows as unmanaged later.
        """
        live = self._containers.get(container)
        if self._containers.is_running(container) and not force:
            raise InvalidRequest("the container is running", field="force", allowed="stop it first, or force=1")
        row_only = self._row_alone(live.record, force)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_idle(transaction, container)
            if row_only and record.phase is not Phase.FAILED:
                require_fenced(transaction, record.node)
            parameters = DeleteParameters(container, record.node, record.generation, force, row_only)
            operation = self._containers.operations.draft(
                caller, "container.delete", containers=(container,), node=record.node, parameters=parameters
            )
            rows.rows.replace(transaction, msgspec.structs.replace(record, operation=operation.id))
            return operation

        return await self._containers.operations.accept(prepare)

    def _row_alone(self, record: Container, force: bool) -> bool:
        """Whether only its row can be deleted, as `force` allows for a failed creation and where the node is fenced.

        Raises Unavailable or Fenced.
        """
        try:
            self._containers.nodes.require_reachable(record.node)
        except (Unavailable, Fenced) as error:
            if record.phase is not Phase.FAILED and not isinstance(error, Fenced):
                raise
            if force:
                return True
            raise type(error)(
                f"{error.text}; with force=1 the container is deleted here alone, and what the node may have of it "
                "stays there and shows as unmanaged when the node is back",
                field="force",
                allowed="force=1, or wait for the node",
            ) from None
        return False

    # ------------------------------------------------------------ conditions

    def _require_stopped(self, container: str, so_that: str) -> None:
        if self._containers.is_running(container):
            raise InvalidRequest("the container is running", field="name", allowed=f"stop it first, then {so_that}")

    def _check_kind(self, record: Container, config: dict[str, str]) -> None:
        """Refuse another kind of container while it runs: all its files change their owners."""
        differs = parse_config(record.config).privileged != parse_config(config).privileged
        if differs and self._containers.is_running(record.id):
            raise InvalidRequest(
                "a running container does not become privileged, or unprivileged",
                field="config.security.privileged",
                allowed="stop it first",
            )
