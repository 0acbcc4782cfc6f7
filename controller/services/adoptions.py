"""Adopting containers that a node has and no row claims: left behind, of before a restored backup, or made by hand."""

from __future__ import annotations

import msgspec

from common.clock import Clock, timestamp
from common.errors import Conflict, InvalidRequest, NoPlacement, NotFound
from common.names import check_container_id, check_hostname
from common.options import parse_config
from common.reports import ContainerReport, ContainerSpec
from common.states import Status
from controller import deviations, placement
from controller.operations.adoptions import ADOPT, AdoptParameters
from controller.records import Container, Operation, Phase
from controller.services.caller import Caller
from controller.services.configuration import check_config
from controller.services.containers import Containers, check_description, free_address, wanted_of
from controller.services.requests import CreateBody
from controller.services.witnesses import MOST_AHEAD
from controller.store import containers as rows
from controller.store import counters
from controller.store.db import Transaction


class Adoptions:
    """Accepts adoptions."""

    def __init__(self, containers: Containers, clock: Clock) -> None:
        self._containers = containers
        self._clock = clock

    async def adopt(self, caller: Caller, container: str | None, body: CreateBody) -> Operation:
        """Accept `source.type: adopt`.

        Raises InvalidRequest, NotFound (node, or no such container of nobody's there), Conflict (the id or the hardware
        address belongs to another container; one made by hand runs), Busy, NoPlacement, Unavailable.
        """
        if container is None:
            raise InvalidRequest("an adoption needs an id", field="id", allowed="the container's own")
        check_container_id(container)
        if body.start:
            raise InvalidRequest("an adopted container goes on as it is", field="start", allowed="false")
        report = self._find(container, self._node(container, body.node))
        spec = self._spec(report, body)
        description = check_description(body.description or "")
        node = body.node or ""

        def prepare(transaction: Transaction) -> Operation:
            self._containers.free_id(transaction, container)
            _raise_generation(transaction, report)
            record = self._record(transaction, spec, node, description)
            self._check_capacity(transaction, record)
            parameters = AdoptParameters(
                msgspec.structs.replace(spec, generation=record.generation, hwaddr=record.hwaddr),
                node,
                report.generation,
            )
            operation = self._containers.operations.draft(
                caller, ADOPT.name, containers=(container,), node=node, parameters=parameters
            )
            rows.rows.insert(transaction, msgspec.structs.replace(record, operation=operation.id))
            return operation

        return await self._containers.operations.accept(prepare)

    def _node(self, container: str, name: str | None) -> str:
        """The node named. Raises InvalidRequest that says which nodes have such a container; NotFound, Unavailable."""
        if name is not None:
            return self._containers.nodes.require_reachable(name).record.name
        having = [node for node, live in self._containers.fleet.nodes.items() if container in live.unclaimed]
        raise InvalidRequest("an adoption needs a node", field="node", allowed=", ".join(sorted(having)) or "its node")

    def _find(self, container: str, node: str) -> ContainerReport:
        """What the node says of the container. Raises NotFound; Conflict when it must be stopped first."""
        fleet = self._containers.fleet
        found = {report.id: report for report in deviations.unmanaged(fleet, fleet.nodes[node])}
        live = fleet.containers.get(container)
        if live is not None and live.record.node == node and live.record.phase is Phase.FAILED and live.report:
            found[container] = live.report  # what a failed creation left there
        if container not in found:
            if live is not None and live.record.phase is not Phase.FAILED:
                raise Conflict(f"container {container} exists already, on node {live.record.node}", field="id")
            raise NotFound(f"node {node} has no unmanaged container {container}", field="id")
        report = found[container]
        if report.generation == 0 and report.status != Status.STOPPED:
            raise Conflict(
                f"container {container} was not made by vzfleet: it must be stopped to be adopted, since its files get "
                "other owners",
                field="id",
                allowed="a stopped one",
            )
        if report.status == Status.ERROR:
            raise Conflict(f"container {container} is not whole: {report.reason}", field="id")
        return report

    def _spec(self, report: ContainerReport, body: CreateBody) -> ContainerSpec:
        """What it is to be; its generation and a missing hardware address come with the transaction."""
        if report.bare and body.config is None:
            raise Conflict(f"node has not told the configuration of {report.id}: give it", field="config")
        config = {**report.config, **(body.config or {})}
        check_config(config)
        if report.generation and parse_config(config).privileged != parse_config(report.config).privileged:
            raise InvalidRequest(
                "an adopted container stays of its kind", field="config.security.privileged", allowed="as it is"
            )
        own = report.hostname or report.id
        hostname = check_hostname(body.hostname if body.hostname is not None else own)
        return ContainerSpec(report.id, 0, hostname, report.hwaddr, config)

    def _record(self, transaction: Transaction, spec: ContainerSpec, node: str, description: str) -> Container:
        if spec.hwaddr and rows.has_address(transaction.connection, spec.hwaddr):
            raise Conflict(f"another container has its hardware address {spec.hwaddr}", field="id")
        memory, disk = self._containers.reservation(spec.config, node)
        return Container(
            id=spec.id,
            node=node,
            generation=counters.advance(transaction, "generation"),
            hostname=spec.hostname,
            description=description,
            config=spec.config,
            image=None,
            hwaddr=spec.hwaddr or free_address(transaction),
            created_at=timestamp(self._clock.now()),
            phase=Phase.CREATING,
            reserved_memory=memory,
            reserved_disk=disk,
        )

    def _check_capacity(self, transaction: Transaction, record: Container) -> None:
        """Raise NoPlacement where the node cannot hold its limits; whether it is used by now is counted already."""
        nodes = self._containers.nodes
        state = nodes.state(record.node, rows.reserved_by_node(transaction), record.id)
        reason = placement.shortage(state, wanted_of(parse_config(record.config), record.node), nodes.policy)
        if reason is not None:
            raise NoPlacement(
                f"node {record.node} cannot hold it: {reason}",
                field="config",
                details={"nodes": {record.node: reason}},
            )


def _raise_generation(transaction: Transaction, report: ContainerReport) -> None:
    """Have the next generation be a later one. Raises Conflict for one that nobody believes."""
    if report.generation > counters.value(transaction.connection, "generation") + MOST_AHEAD:
        raise Conflict(f"its node claims that {report.id} is of generation {report.generation}", field="id")
    counters.raise_to(transaction, "generation", report.generation)
