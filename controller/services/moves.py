"""Moving containers to another node, under their own id or another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from common.errors import Conflict, InvalidRequest
from common.names import check_container_id, check_hostname
from common.options import parse_config
from common.reports import ContainerSpec
from controller.operations.moves import STOP_TIMEOUT, MoveParameters
from controller.records import Container, Operation
from controller.services.caller import Caller
from controller.services.changes import Changes, check_rename
from controller.services.configuration import check_config
from controller.services.containers import Containers, check_description, spec_of, wanted_of
from controller.services.journeys import check_ends, check_shape, rate_of
from controller.services.present_use import check_disk
from controller.services.requests import CreateBody, MigrationSource, RenameBody
from controller.services.states import LONGEST_STOP
from controller.store import containers as rows
from controller.store import counters
from controller.store.db import Transaction


@dataclass(frozen=True)
class _Wanted:
    """Where a container goes, how, and what it is there. None: as it is; `config` is laid over its own.

    `timeout` in seconds for its own shutdown, `rate` in bytes per second.
    """

    id: str
    node: str | None
    hostname: str | None
    timeout: float
    force: bool
    rate: int | None
    description: str | None = None
    config: dict[str, str] = field(default_factory=dict)


class Moves:
    """Moves between nodes. One that turns out to stay on its node is a change of its names, left to `Changes`."""

    def __init__(self, containers: Containers, changes: Changes) -> None:
        self._containers = containers
        self._changes = changes

    async def move(self, caller: Caller, container: str, body: RenameBody) -> Operation:
        """Accept `migration: true`. Raises InvalidRequest, NotFound, Conflict, Busy, NoPlacement, Unavailable."""
        self._containers.get(container)
        check_rename(body)
        name = check_container_id(body.name, "name") if body.name is not None else container
        return await self._accept(caller, container, self._wanted(name, body))

    async def migrate(self, caller: Caller, id: str, body: CreateBody, source: MigrationSource) -> Operation:
        """Accept `source.type: migration`: an existing container moved to a node, or to another id.

        Raises what `move` raises.
        """
        check_container_id(id)
        live = self._containers.get(check_container_id(source.source, "source.source"), "source.source")
        config = body.config or {}
        check_config(config)
        check_disk(live, parse_config(live.record.config), parse_config({**live.record.config, **config}))
        description = check_description(body.description) if body.description is not None else None
        if body.start:
            raise InvalidRequest("a moved container runs when it ran before", field="start", allowed="false")
        there = replace(self._wanted(id, body), description=description, config=config)
        return await self._accept(caller, source.source, there)

    def _wanted(self, id: str, body: RenameBody | CreateBody) -> _Wanted:
        check_shape(body)
        hostname = check_hostname(body.hostname) if body.hostname is not None else None
        timeout = STOP_TIMEOUT if body.timeout is None else LONGEST_STOP if body.timeout < 0 else body.timeout
        rate = rate_of(body.bandwidth, self._containers.nodes.transfer_bandwidth)
        return _Wanted(id, body.node, hostname, timeout, body.force, rate)

    async def _accept(self, caller: Caller, container: str, there: _Wanted) -> Operation:
        live = self._containers.get(container)
        self._containers.require_whole(live.record)
        source = self._containers.nodes.require_reachable(live.record.node)
        if there.node is None and there.id == container:
            raise InvalidRequest("a move needs the node to move to", field="node", allowed="the name of another node")
        target = self._containers.nodes.require_reachable(there.node or live.record.node).record.name
        if target == live.record.node:
            if there.id == container:
                raise Conflict(f"container {container} is on node {target} already", field="node")
            return await self._changes.rename(caller, container, RenameBody(hostname=there.hostname, name=there.id))
        check_ends(source, self._containers.nodes.require(target), live)
        running = self._containers.is_running(container)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            if record.node == target:
                raise Conflict(f"container {container} is on node {target} already", field="node")
            if there.id != container:
                self._containers.free_id(transaction, there.id)
            return self._write(transaction, caller, record, there, target, running)

        return await self._containers.operations.accept(prepare)

    def _write(
        self,
        transaction: Transaction,
        caller: Caller,
        record: Container,
        there: _Wanted,
        target: str,
        running: bool,
    ) -> Operation:
        config = {**record.config, **there.config}
        hostname = there.hostname or record.hostname
        chosen = self._containers.choose(transaction, wanted_of(parse_config(config), target), hostname, there.id)
        generation = counters.advance(transaction, "generation")
        parameters = MoveParameters(
            old=spec_of(record),
            source_node=record.node,
            new=ContainerSpec(there.id, generation, hostname, record.hwaddr, config),
            node=target,
            description=record.description if there.description is None else there.description,
            running=running,
            reserved=self._containers.reservation(config, target),
            timeout=there.timeout,
            force=there.force,
            rate=there.rate,
        )
        operation = self._containers.operations.draft(
            caller,
            "container.move",
            containers=(record.id,) if there.id == record.id else (record.id, there.id),
            node=target,
            parameters=parameters,
            extra_time=0 if there.force else there.timeout,
            metadata={"placement": chosen.reasons},
        )
        rows.rows.replace(transaction, msgspec.structs.replace(record, operation=operation.id))
        return operation
