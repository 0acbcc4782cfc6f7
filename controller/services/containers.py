"""Creating containers: from an image, empty, as a copy of another; and choosing their node."""

from __future__ import annotations

from typing import Any

import msgspec

from common.clock import Clock, timestamp
from common.errors import Conflict, InvalidRequest, NoPlacement, NotFound
from common.names import check_container_id, check_hostname, check_snapshot_name, has_control_characters
from common.options import Settings, parse_config
from common.reports import ContainerSpec
from common.states import Status
from controller import placement
from controller.fleet import Fleet
from controller.identifiers import container_id, hardware_address
from controller.live import LiveContainer
from controller.operations.containers import CreateParameters
from controller.operations.copies import CopyParameters
from controller.placement import Placement, Wanted
from controller.records import Container, Operation, Phase
from controller.services.caller import Caller
from controller.services.configuration import check_config
from controller.services.image_sources import ImageSources
from controller.services.images import Resolved
from controller.services.journeys import check_ends, check_shape, rate_of
from controller.services.nodes import Nodes, hostname_prefix
from controller.services.operations import Operations
from controller.services.present_use import check_disk
from controller.services.requests import CopySource, CreateBody, ImageSource, PlacementBody
from controller.store import containers as rows
from controller.store import counters
from controller.store import operations as operation_rows
from controller.store.db import Database, Transaction


def spec_of(record: Container) -> ContainerSpec:
    """What a node must know of a container."""
    return ContainerSpec(record.id, record.generation, record.hostname, record.hwaddr, record.config)


def check_description(text: str) -> str:
    """Return a description that fits one line, else raise InvalidRequest."""
    if has_control_characters(text) or len(text) > 1024:
        raise InvalidRequest(
            "invalid description", field="description", allowed="at most 1024 characters, no control characters"
        )
    return text


class Containers:
    """Creation, and what the other services of containers share."""

    def __init__(
        self, store: Database, fleet: Fleet, nodes: Nodes, images: ImageSources, operations: Operations, clock: Clock
    ) -> None:
        self.store = store
        self.fleet = fleet
        self.nodes = nodes
        self.operations = operations
        self._images = images
        self._clock = clock

    def get(self, container: str, field: str = "id") -> LiveContainer:
        """The container. Raises NotFound naming `field`."""
        live = self.fleet.containers.get(container)
        if live is None:
            raise NotFound(f"container {container[:64]} not found", field=field)
        return live

    def is_running(self, container: str) -> bool:
        """Whether its node says that it runs, or is frozen. Raises NotFound."""
        report = self.get(container).report
        return report is not None and report.status in (Status.RUNNING, Status.FROZEN)

    @staticmethod
    def require_whole(record: Container) -> None:
        """Raise Conflict for what is left of a creation that failed."""
        if record.phase is not Phase.READY and record.operation is None:
            raise Conflict(f"container {record.id} is not whole: {record.error}", field="id")

    async def create(self, caller: Caller, container: str | None, body: CreateBody) -> Operation:
        """Accept a creation from an image, as a copy, or with an empty root.

        Raises InvalidRequest, NotFound (image, node, source), Conflict (id), NoPlacement, Busy (source of a copy),
        Unavailable (its node).
        """
        id = check_container_id(container) if container is not None else container_id()
        config = body.config or {}
        check_config(config)
        if body.node is not None:
            self.nodes.require_reachable(body.node)
        check_shape(body)
        if isinstance(body.source, CopySource):
            return await self._create_copy(caller, id, body, body.source)
        wanted_image = body.source if isinstance(body.source, ImageSource) else None
        image = self._images.resolve(wanted_image, caller, body.node) if wanted_image is not None else None
        hostname = check_hostname(body.hostname if body.hostname is not None else id)
        description = check_description(body.description or "")

        def prepare(transaction: Transaction) -> Operation:
            wanted = wanted_of(parse_config(config), body.node, image.architecture if image else None)
            chosen = self.choose(transaction, wanted, hostname, id)
            record = self.new_record(
                transaction, id, chosen, hostname, description, config, image.requested if image else None
            )
            return self._accept_creation(transaction, caller, record, body.start, image, chosen)

        return await self.operations.accept(prepare)

    def _accept_creation(
        self,
        transaction: Transaction,
        caller: Caller,
        record: Container,
        start: bool,
        image: Resolved | None,
        chosen: Placement,
    ) -> Operation:
        parameters = CreateParameters(
            spec=spec_of(record),
            node=record.node,
            fingerprint=image.fingerprint if image else None,
            source=image.source if image else None,
            properties=image.properties if image else {},
            start=start,
            remote=image.remote if image else None,
        )
        operation = self.operations.draft(
            caller,
            "container.create",
            containers=(record.id,),
            node=record.node,
            parameters=parameters,
            metadata={"placement": chosen.reasons},
        )
        rows.rows.insert(transaction, msgspec.structs.replace(record, operation=operation.id))
        return operation

    # ------------------------------------------------------------ copies

    async def _create_copy(self, caller: Caller, id: str, body: CreateBody, source: CopySource) -> Operation:
        name, _, snapshot = source.source.partition("/")
        check_container_id(name, "source.source")
        if snapshot:
            check_snapshot_name(snapshot, "source.source")
        original = self.require_source(name, snapshot)
        self.nodes.require_reachable(original.record.node)
        base = original.snapshots[snapshot].config if snapshot else original.record.config
        config = {**base, **(body.config or {})}
        check_config(config)
        if not snapshot:
            check_disk(original, parse_config(base), parse_config(config))
        hostname = check_hostname(body.hostname if body.hostname is not None else id)
        description = check_description(
            body.description if body.description is not None else original.record.description
        )
        rate = rate_of(body.bandwidth, self.nodes.transfer_bandwidth)

        def prepare(transaction: Transaction) -> Operation:
            held = rows.require_ready(transaction, name)
            wanted = wanted_of(parse_config(config), body.node, self.architecture(held.node))
            chosen = self._choose_for_copy(transaction, wanted, hostname, held.node, id)
            record = self.new_record(transaction, id, chosen, hostname, description, config, held.image)
            if record.node != held.node:
                check_ends(self.nodes.require(held.node), self.nodes.require(record.node), original, not snapshot)
            parameters = CopyParameters(
                spec_of(record), record.node, spec_of(held), held.node, snapshot or None, body.start, rate
            )
            operation = self.operations.draft(
                caller,
                "container.copy",
                containers=(id, name),
                node=record.node,
                parameters=parameters,
                metadata={"placement": chosen.reasons},
            )
            rows.rows.replace(transaction, msgspec.structs.replace(held, operation=operation.id))
            rows.rows.insert(transaction, msgspec.structs.replace(record, operation=operation.id))
            return operation

        return await self.operations.accept(prepare)

    def require_source(self, name: str, snapshot: str) -> LiveContainer:
        """What is to be copied: a whole container, with this snapshot unless it is empty. Raises NotFound, Conflict."""
        live = self.fleet.containers.get(name)
        if live is None:
            raise NotFound(f"container {name} not found", field="source.source")
        if snapshot and snapshot not in live.snapshots:
            raise NotFound(f"container {name} has no snapshot {snapshot}", field="source.source")
        if live.record.phase is not Phase.READY:
            raise Conflict(f"container {name} is not whole: {live.record.phase}", field="source.source")
        return live

    def _choose_for_copy(
        self, transaction: Transaction, wanted: Wanted, hostname: str, home: str, id: str
    ) -> Placement:
        """The source's own node if it fits, since a copy there shares its blocks; else any."""
        if wanted.node is None:
            at_home = self._place(transaction, msgspec.structs.replace(wanted, node=home), hostname, id)
            if at_home.node is not None:
                return Placement(home, {**at_home.reasons, home: "the source is there"})
        return self.choose(transaction, wanted, hostname, id)

    def architecture(self, node: str) -> str | None:
        """The architecture of a node; None while it is not known."""
        live = self.fleet.nodes.get(node)
        return live.record.facts.architecture if live is not None and live.record.facts is not None else None

    # ------------------------------------------------------------ placement and rows

    async def place(self, body: PlacementBody) -> Placement:
        """Where a container with this configuration would go, without doing anything."""
        config = body.config or {}
        check_config(config)
        if body.node is not None:
            self.nodes.require(body.node)
        wanted = wanted_of(parse_config(config), body.node, body.architecture)
        return await self.store.read(
            lambda connection: self._place(Transaction(connection), wanted, body.hostname, None)
        )

    def choose(self, transaction: Transaction, wanted: Wanted, hostname: str | None, container: str) -> Placement:
        """A node that fits for `container`. Raises NoPlacement with the reason of every node."""
        chosen = self._place(transaction, wanted, hostname, container)
        if chosen.node is None:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in chosen.reasons.items())
            raise NoPlacement(
                f"no node fits: {reasons or 'there are no nodes'}", field="node", details={"nodes": chosen.reasons}
            )
        return chosen

    def _place(
        self, transaction: Transaction, wanted: Wanted, hostname: str | None, container: str | None
    ) -> Placement:
        prefix = hostname_prefix(hostname) if hostname else None
        states = self.nodes.states(rows.reserved_by_node(transaction), prefix, container)
        return placement.place(states, wanted, self.nodes.policy)

    def new_record(
        self,
        transaction: Transaction,
        id: str,
        chosen: Placement,
        hostname: str,
        description: str,
        config: dict[str, str],
        image: dict[str, Any] | None,
    ) -> Container:
        """The row of a container to be created; one whose creation failed makes room. Raises Conflict or Busy."""
        self.free_id(transaction, id)
        node = chosen.node or ""
        memory, disk = self.reservation(config, node)
        return Container(
            id=id,
            node=node,
            generation=counters.advance(transaction, "generation"),
            hostname=hostname,
            description=description,
            config=config,
            image=image,
            hwaddr=free_address(transaction),
            created_at=timestamp(self._clock.now()),
            phase=Phase.CREATING,
            reserved_memory=memory,
            reserved_disk=disk,
        )

    def free_id(self, transaction: Transaction, id: str, field: str = "id") -> None:
        """Make sure that nobody has the id, or is about to. Raises Conflict naming `field`, or Busy."""
        present = rows.rows.get(transaction.connection, id)
        if present is not None:
            rows.require_idle(transaction, id)
            if present.phase is not Phase.FAILED:
                raise Conflict(f"container {id} exists already", field=field)
            rows.rows.delete(transaction, id)
        claiming = operation_rows.claiming(transaction.connection, id)
        if claiming is not None:
            raise Conflict(f"the id {id} is taken by operation {claiming}", field=field)

    def reservation(self, config: dict[str, str], node: str) -> tuple[int, int]:
        """(memory, disk) in bytes that a configuration reserves on a node."""
        settings = parse_config(config)
        return settings.memory_bytes(self.nodes.memory_of(node)) or 0, settings.disk or 0


def free_address(transaction: Transaction) -> str:
    """A hardware address that no container has."""
    while rows.has_address(transaction.connection, address := hardware_address()):
        pass
    return address


def wanted_of(settings: Settings, node: str | None, architecture: str | None = None) -> Wanted:
    """What a configuration asks of a node."""
    return Wanted(
        node=node,
        architecture=architecture,
        cpus=settings.cpus,
        memory=settings.memory,
        memory_share=settings.memory_share,
        disk=settings.disk,
    )
