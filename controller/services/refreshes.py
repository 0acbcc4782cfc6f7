"""Refreshing a copy: a stopped container gets the files of another one, and stays what it is."""

from __future__ import annotations

import msgspec

from common.errors import Conflict, InvalidRequest
from common.names import check_container_id, check_snapshot_name
from common.options import parse_config
from controller.operations.copies import REFRESH, CopyParameters
from controller.records import Operation
from controller.services.caller import Caller
from controller.services.containers import Containers, spec_of
from controller.services.journeys import check_ends, check_shape, rate_of
from controller.services.present_use import check_disk
from controller.services.requests import CopySource, CreateBody
from controller.store import containers as rows
from controller.store.db import Transaction

_ITS_OWN = ("hostname", "config", "description", "node", "start")


class Refreshes:
    """Accepts refreshes."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers

    async def refresh(self, caller: Caller, container: str | None, body: CreateBody, source: CopySource) -> Operation:
        """Accept `source.type: copy` with `refresh`.

        Raises InvalidRequest, NotFound, Conflict (it runs, or is not whole), Busy, Unavailable, NoPlacement.
        """
        if container is None:
            raise InvalidRequest("a refresh needs the id of the copy", field="id", allowed="a container that exists")
        check_container_id(container)
        check_shape(body)
        for field in _ITS_OWN:
            if getattr(body, field) not in (None, False):
                raise InvalidRequest("a refreshed container keeps its own", field=field, allowed="nothing")
        name, _, snapshot = source.source.partition("/")
        check_container_id(name, "source.source")
        if snapshot:
            check_snapshot_name(snapshot, "source.source")
        self._check(container, name, snapshot)
        rate = rate_of(body.bandwidth, self._containers.nodes.transfer_bandwidth)

        def prepare(transaction: Transaction) -> Operation:
            copy, held = rows.require_ready(transaction, container), rows.require_ready(transaction, name)
            parameters = CopyParameters(
                spec_of(copy), copy.node, spec_of(held), held.node, snapshot or None, start=False, rate=rate
            )
            operation = self._containers.operations.draft(
                caller, REFRESH.name, containers=(container, name), node=copy.node, parameters=parameters
            )
            for record in (copy, held):
                rows.rows.replace(transaction, msgspec.structs.replace(record, operation=operation.id))
            return operation

        return await self._containers.operations.accept(prepare)

    def _check(self, container: str, name: str, snapshot: str) -> None:
        """Raise what refuses a refresh of `container` by what is known of both."""
        nodes = self._containers.nodes
        copy = self._containers.get(container)
        if name == container:
            raise InvalidRequest(
                "a container cannot be refreshed from itself", field="source.source", allowed="another container"
            )
        original = self._containers.require_source(name, snapshot)
        self._containers.require_whole(copy.record)
        target = nodes.require_reachable(copy.record.node)
        source = nodes.require_reachable(original.record.node)
        if self._containers.is_running(container):
            raise Conflict(f"container {container} is running: stop it first", field="id", allowed="a stopped one")
        if not snapshot:
            check_disk(original, parse_config(original.record.config), parse_config(copy.record.config))
        if target is not source:
            # What it has already is not sent again: how much room the rest takes its node sees.
            check_ends(source, target, original, used=False)
