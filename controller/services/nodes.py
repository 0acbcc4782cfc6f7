"""Nodes: what placement knows of them, what their agents report, and their figures through a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

import msgspec

from common.clock import Clock, timestamp
from common.errors import Fenced, NotFound, Unavailable
from common.messages import Hello, Inventory, Samples, StateChanged
from common.reports import NodeFacts
from common.states import NodeStatus
from controller.fleet import Fleet
from controller.live import LiveContainer, LiveNode
from controller.placement import NodeState, Policy
from controller.records import NodeMode
from controller.settings import ControllerSettings
from controller.store import nodes as rows
from controller.store import operations as operation_rows
from controller.store.containers import Reserved
from controller.store.db import Database, Transaction

log = logging.getLogger(__name__)


async def startable(store: Database, fleet: Fleet, node: str) -> dict[str, int]:
    """What belongs to a node and may be started by it after a boot: not what is on its way to another node."""
    unfinished = await store.read(operation_rows.unfinished)
    leaving = {name for each in unfinished if each.kind == "container.move" for name in each.containers}
    return {name: number for name, number in fleet.generations(node).items() if name not in leaving}


class Nodes:
    """The nodes of the fleet. Hears what the dispatcher reports of them."""

    def __init__(self, store: Database, fleet: Fleet, settings: ControllerSettings, clock: Clock) -> None:
        self._store = store
        self._fleet = fleet
        self._clock = clock
        self._changed = asyncio.Event()
        self.transfer_bandwidth = settings.transfer_bandwidth
        """Bytes per second that a container's data take at most on their way; None: as many as there are."""
        self.policy = Policy(settings.overcommit_memory, settings.overcommit_disk, settings.spread_by_hostname)

    # ------------------------------------------------------------ asking

    def require(self, name: str, field: str = "node") -> LiveNode:
        """The node. Raises NotFound."""
        node = self._fleet.nodes.get(name)
        if node is None:
            raise NotFound(f"node {name[:64]} not found", field=field)
        return node

    def require_reachable(self, name: str) -> LiveNode:
        """The node, which can be spoken with now. Raises NotFound, Fenced or Unavailable."""
        node = self.require(name)
        if node.record.mode is NodeMode.FENCED:
            raise Fenced(f"node {name} was {node.fence}")
        if not node.reachable:
            raise Unavailable(f"node {name} is out of reach: {node.message}")
        return node

    async def all_reachable(self, seconds: float) -> None:
        """Return when all nodes but the fenced ones can be spoken with, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(_may_come(node) for node in self._fleet.nodes.values()):
                    await self._changed.wait()

    def memory_of(self, name: str) -> int:
        """A node's memory in bytes; 0 while it is not known."""
        node = self._fleet.nodes.get(name)
        return node.record.facts.memory if node is not None and node.record.facts is not None else 0

    def states(
        self, reserved: Mapping[str, Reserved], prefix: str | None = None, container: str | None = None
    ) -> list[NodeState]:
        """What placement of `container` must know: facts, load, the reservations that its transaction has read.

        Runs in the store's thread while the fleet changes: everything is copied before it is looked through.
        """
        return [
            self._state(node, reserved.get(name, Reserved()), prefix, container)
            for name, node in list(self._fleet.nodes.items())
        ]

    def state(self, name: str, reserved: Mapping[str, Reserved], container: str) -> NodeState:
        """What `states` says of one node. Raises NotFound."""
        return self._state(self.require(name), reserved.get(name, Reserved()), None, container)

    def _state(self, node: LiveNode, reserved: Reserved, prefix: str | None, container: str | None) -> NodeState:
        found = (self._fleet.containers.get(id) for id in list(node.containers))
        others = [live for live in found if live is not None and live.record.id != container]
        memory, disk = _used_without_limit(others)
        counted = Reserved(reserved.memory + memory, reserved.disk + disk, reserved.containers)
        peers = 0
        if prefix is not None and self.policy.spread_by_hostname:
            peers = sum(hostname_prefix(live.record.hostname) == prefix for live in others)
        return _placement_state(node, counted, peers, taken=container in node.unclaimed)

    def has_unmanaged(self, name: str, container: str) -> bool:
        """Whether a container of nobody's has this id on the node."""
        node = self._fleet.nodes.get(name)
        return node is not None and container in node.unclaimed

    # ------------------------------------------------------------ what agents report (LinkListener)

    def hello(self, node: str, hello: Hello) -> None:
        """An agent was let in."""
        log.info("agent connected", extra={"node": node, "version": hello.version, "boot": hello.boot_id})

    def inventory(self, node: str, inventory: Inventory) -> Awaitable[Mapping[str, int]]:
        """Take over all that a node has; keep its facts when they changed."""
        known = self.require(node).record.facts
        # At once, not when a task gets its turn: what the node reports next is newer.
        self._fleet.inventory(node, inventory)
        return self._keep_facts(node, known, inventory.facts)

    async def _keep_facts(self, node: str, known: NodeFacts | None, facts: NodeFacts) -> Mapping[str, int]:
        if known != facts:
            await self._store.write(lambda transaction: _put_facts(transaction, node, facts))
        return await startable(self._store, self._fleet, node)

    def samples(self, node: str, samples: Samples) -> None:
        """Take over new figures."""
        self._fleet.samples(node, samples)

    def state_changed(self, node: str, change: StateChanged) -> None:
        """Take over what happened to a container by itself."""
        self._fleet.state_changed(node, change.container, change.removed)

    def node_status(self, node: str, status: NodeStatus, reason: str) -> None:
        """Take over whether the node can be reached."""
        log.info("node status", extra={"node": node, "status": str(status), "reason": reason})
        self._fleet.node_status(node, status, reason)
        self._changed.set()
        self._changed = asyncio.Event()

    # ------------------------------------------------------------ figures through a restart

    async def save_figures(self) -> None:
        """Keep every node's last figures."""
        now = timestamp(self._clock.now())
        batches = {name: self._batch(node) for name, node in self._fleet.nodes.items()}

        def write(transaction: Transaction) -> None:
            for name, batch in batches.items():
                if batch is not None and rows.rows.get(transaction.connection, name) is not None:
                    rows.save_samples(transaction, name, now, batch)

        await self._store.write(write)

    def _batch(self, node: LiveNode) -> Any:
        lives = [self._fleet.containers[container] for container in sorted(node.containers)]
        return {
            "containers": [
                {
                    "sample": msgspec.to_builtins(live.sample),
                    "sampled_at": live.sampled_at,
                    "report": msgspec.to_builtins(live.report),
                }
                for live in lives
                if live.report is not None
            ],
            "last_seen": node.last_seen,
        }

    async def restore_figures(self) -> None:
        """Take the kept figures over; they count until the node reports again."""
        for name, (_, body) in (await self._store.read(rows.saved_samples)).items():
            try:
                self._fleet.restore(name, body)
            except (msgspec.ValidationError, KeyError) as error:
                log.warning("kept figures are of another version", extra={"node": name, "reason": str(error)})


def hostname_prefix(hostname: str) -> str:
    """A hostname without its trailing number: `web` for `web-12` and `web12`."""
    return hostname.rstrip("0123456789").rstrip("-_.")


def _may_come(node: LiveNode) -> bool:
    return not node.reachable and node.record.mode is not NodeMode.FENCED


def _put_facts(transaction: Transaction, name: str, facts: NodeFacts) -> None:
    record = rows.rows.get(transaction.connection, name)
    if record is not None:
        rows.rows.replace(transaction, msgspec.structs.replace(record, facts=facts))


def _used_without_limit(containers: Iterable[LiveContainer]) -> tuple[int, int]:
    """(memory, disk) in bytes that containers without such a limit use, as far as it is known."""
    memory = disk = 0
    for live in containers:
        record, sample = live.record, live.figures
        if not record.reserved_memory:
            memory += max(0, (sample.memory_usage or 0) - (sample.memory_reclaimable or 0))
        if not record.reserved_disk:
            disk += sample.disk_usage or 0
    return memory, disk


def _placement_state(node: LiveNode, reserved: Reserved, peers: int, taken: bool) -> NodeState:
    facts, sample = node.record.facts, node.sample
    return NodeState(
        name=node.record.name,
        status=node.shown if facts is not None else NodeStatus.OFFLINE,
        architecture=facts.architecture if facts else "",
        cpus=facts.cpus if facts else 0,
        memory=facts.memory if facts else 0,
        memory_free=sample.memory_free if sample else (facts.memory if facts else 0),
        disk=facts.disk if facts else 0,
        disk_free=sample.disk_free if sample else (facts.disk if facts else 0),
        disk_limits=facts is not None and "disk_limits" in facts.capabilities,
        containers=reserved.containers,
        reserved_memory=reserved.memory,
        reserved_disk=reserved.disk,
        peers=peers,
        taken=taken,
    )
