"""Changing containers: configuration, hostname, id, node; and deleting them."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import UNSET

from common.errors import Conflict, InvalidRequest, NoPlacement, PreconditionFailed
from common.names import check_container_id, check_hostname
from common.options import check_config, parse_config
from common.reports import ContainerSpec
from common.states import Status
from controller.operations.containers import ChangeParameters, DeleteParameters
from controller.operations.moves import MoveParameters
from controller.records import Container, Operation, Phase
from controller.services.caller import Caller
from controller.services.containers import Containers, check_description, spec_of, wanted_of
from controller.services.requests import CreateBody, MigrationSource, RenameBody, UpdateBody
from controller.store import containers as rows
from controller.store import counters
from controller.store.db import Transaction

RUNNING = (Status.RUNNING, Status.FROZEN)


def etag_of(record: Container) -> str:
    """A hash of what can be written and of nothing that changes by itself (R8, R9), unquoted."""
    written = [record.hostname, record.description, sorted(record.config.items())]
    return hashlib.sha256(msgspec.json.encode(written)).hexdigest()


def check_match(record: Container, expected: str | None) -> None:
    """Raise PreconditionFailed unless `expected` (an If-Match header, quoted or not) names the record's ETag."""
    if expected is None or expected.strip() == "*":
        return
    tags = {tag.strip().removeprefix("W/").strip('"') for tag in expected.split(",")}
    if etag_of(record) not in tags:
        raise PreconditionFailed("the container was changed meanwhile: GET it again", field="If-Match")


class Changes:
    """Changes to containers that exist."""

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
        self._require_whole(live.record)
        self._containers.nodes.require_reachable(live.record.node)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            check_match(record, expected)
            self._check_kind(record, body.config)
            new = msgspec.structs.replace(spec_of(record), config=body.config)
            text = record.description if description is None else description
            return self._change(transaction, caller, "container.update", record, new, text)

        return await self._containers.operations.accept(prepare)

    async def rename(self, caller: Caller, container: str, body: RenameBody) -> Operation:
        """Accept another hostname or id, or a move. Raises what `update` raises, and Conflict."""
        live = self._containers.get(container)
        if body.hostname is None and body.name is None and body.node is None:
            raise InvalidRequest(
                "nothing to be done", field="source", allowed="source (to create), or hostname, name, or node"
            )
        name = check_container_id(body.name, "name") if body.name is not None else container
        hostname = check_hostname(body.hostname) if body.hostname is not None else None
        if body.node is not None and not body.migration:
            raise InvalidRequest("a move says migration: true", field="migration", allowed="true")
        if body.migration:
            return await self._move(caller, container, name, hostname, body.node, {}, None)
        self._require_whole(live.record)
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
        """Refuse limits that its node cannot hold; what it reserves already is its own."""
        settings = parse_config(new.config)
        reserved = rows.reserved_by_node(transaction)
        for state in self._containers.nodes.states(reserved, container=record.id):
            if state.name != record.node:
                continue
            memory = (settings.memory_bytes(state.memory) or 0) - record.reserved_memory
            disk = (settings.disk or 0) - record.reserved_disk
            problems = []
            policy = self._containers.nodes.policy
            if memory > 0 and state.reserved_memory + memory > state.memory * policy.overcommit_memory:
                problems.append("not enough memory left to reserve")
            if disk > 0 and state.reserved_disk + disk > state.disk * policy.overcommit_disk:
                problems.append("not enough disk left to reserve")
            if settings.disk is not None and not state.disk_limits:
                problems.append("its storage cannot hold a disk limit (that needs btrfs)")
            if settings.cpus is not None and settings.cpus > state.cpus:
                problems.append(f"{state.cpus} CPUs, {settings.cpus} are asked for")
            if problems:
                reason = ", ".join(problems)
                raise NoPlacement(
                    f"node {record.node} cannot hold that: {reason}",
                    field="config",
                    details={"nodes": {record.node: reason}},
                )

    # ------------------------------------------------------------ moving

    async def migrate(self, caller: Caller, id: str, body: CreateBody, source: MigrationSource) -> Operation:
        """Accept `source.type: migration`: an existing container moved to a node, or to another id."""
        check_container_id(id)
        self._containers.get(check_container_id(source.source, "source.source"), "source.source")
        check_config(body.config or {})
        hostname = check_hostname(body.hostname) if body.hostname is not None else None
        description = check_description(body.description) if body.description is not None else None
        if body.start:
            raise InvalidRequest("a moved container runs when it ran before", field="start", allowed="false")
        return await self._move(caller, source.source, id, hostname, body.node, body.config or {}, description)

    async def _move(
        self,
        caller: Caller,
        container: str,
        new_id: str,
        hostname: str | None,
        node: str | None,
        config: dict[str, str],
        description: str | None,
    ) -> Operation:
        live = self._containers.get(container)
        self._require_whole(live.record)
        self._containers.nodes.require_reachable(live.record.node)
        if node is None and new_id == container:
            raise InvalidRequest("a move needs the node to move to", field="node", allowed="the name of another node")
        target = self._containers.nodes.require_reachable(node or live.record.node).record.name
        if target == live.record.node:
            if new_id == container:
                raise Conflict(f"container {container} is on node {target} already", field="node")
            return await self.rename(caller, container, RenameBody(hostname=hostname, name=new_id))
        running = self._is_running(container)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            if record.node == target:
                raise Conflict(f"container {container} is on node {target} already", field="node")
            if new_id != container:
                self._containers.free_id(transaction, new_id)
            name = hostname or record.hostname
            return self._accept_move(transaction, caller, record, new_id, name, target, config, description, running)

        return await self._containers.operations.accept(prepare)

    def _accept_move(
        self,
        transaction: Transaction,
        caller: Caller,
        record: Container,
        new_id: str,
        hostname: str,
        target: str,
        config: dict[str, str],
        description: str | None,
        running: bool,
    ) -> Operation:
        merged = {**record.config, **config}
        chosen = self._containers.choose(transaction, wanted_of(parse_config(merged), target), hostname, new_id)
        new = ContainerSpec(new_id, counters.advance(transaction, "generation"), hostname, record.hwaddr, merged)
        parameters = MoveParameters(
            old=spec_of(record),
            source_node=record.node,
            new=new,
            node=target,
            description=record.description if description is None else description,
            running=running,
            reserved=self._containers.reservation(merged, target),
        )
        ids = (record.id,) if new_id == record.id else (record.id, new_id)
        operation = self._containers.operations.draft(
            caller,
            "container.move",
            containers=ids,
            node=target,
            parameters=parameters,
            metadata={"placement": chosen.reasons},
        )
        rows.rows.replace(transaction, msgspec.structs.replace(record, operation=operation.id))
        return operation

    # ------------------------------------------------------------ deleting

    async def delete(self, caller: Caller, container: str, force: bool) -> Operation:
        """Accept a deletion. Raises NotFound, InvalidRequest (it runs, no `force`), Busy, Unavailable."""
        live = self._containers.get(container)
        if self._is_running(container) and not force:
            raise InvalidRequest("the container is running", field="force", allowed="stop it first, or force=1")
        self._containers.nodes.require_reachable(live.record.node)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_idle(transaction, container)
            parameters = DeleteParameters(container, record.node, record.generation, force)
            operation = self._containers.operations.draft(
                caller, "container.delete", containers=(container,), node=record.node, parameters=parameters
            )
            rows.rows.replace(transaction, msgspec.structs.replace(record, operation=operation.id))
            return operation

        return await self._containers.operations.accept(prepare)

    # ------------------------------------------------------------ conditions

    def _is_running(self, container: str) -> bool:
        report = self._containers.get(container).report
        return report is not None and report.status in RUNNING

    def _require_stopped(self, container: str, so_that: str) -> None:
        if self._is_running(container):
            raise InvalidRequest("the container is running", field="name", allowed=f"stop it first, then {so_that}")

    def _check_kind(self, record: Container, config: dict[str, str]) -> None:
        """Refuse another kind of container while it runs: all its files change their owners."""
        if parse_config(record.config).privileged != parse_config(config).privileged and self._is_running(record.id):
            raise InvalidRequest(
                "a running container does not become privileged, or unprivileged",
                field="config.security.privileged",
                allowed="stop it first",
            )

    def _require_whole(self, record: Container) -> None:
        if record.phase is not Phase.READY and record.operation is None:
            raise Conflict(f"container {record.id} is not whole: {record.error}", field="id")
