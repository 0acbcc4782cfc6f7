"""The fleet as the controller knows it now: rows of nodes and containers, and their live state with its age.

A mirror of committed rows plus what agents pushed. No SQL, no waiting: every read of the API is answered from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from common.clock import Clock, timestamp
from common.messages import Inventory, Outcome, Samples
from common.reports import ContainerReport, ContainerSample, NodeSample
from common.states import CONTAINER_STATES, NodeStatus, Status
from controller.records import Change, Container, Image, Node, Phase, Snapshot

MAX_UNCLAIMED = 10_000
"""Containers of nobody that are kept for a node: what agents send must not fill the memory."""
CLOCK_STEP = 60.0
"""Seconds; figures that are older than the present ones by more come from a clock that was set back."""


@dataclass
class LiveContainer:
    """A container's row, what its node last reported of it, and its last figures with their time."""

    record: Container
    report: ContainerReport | None = None
    sample: ContainerSample | None = None
    sampled_at: float | None = None
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    version: int = 0
    rendered: dict[str, bytes] = field(default_factory=dict)
    """Answers of the API as bytes, by kind; dropped at every change."""

    @property
    def figures(self) -> ContainerSample:
        """Its last figures as far as they still hold: one that has stopped has no address, processes or memory."""
        sample = self.sample or ContainerSample(self.record.id)
        if self.report is None or self.report.status != Status.STOPPED:
            return sample
        return ContainerSample(sample.id, disk_limit=sample.disk_limit, disk_usage=sample.disk_usage)


@dataclass
class Unclaimed:
    """A container on a node of which no row says that it belongs there: made by hand, or about to be claimed."""

    report: ContainerReport
    sample: ContainerSample | None = None
    sampled_at: float | None = None


@dataclass
class LiveNode:
    """A node's row, its status with the reason, and its load.

    `images` are those it holds, each with whether it is ready for containers with an id map; None: no inventory yet.
    """

    record: Node
    status: NodeStatus = NodeStatus.OFFLINE
    reason: str = "not connected since the controller started"
    since: str = ""
    last_seen: str | None = None
    sample: NodeSample | None = None
    sampled_at: float | None = None
    images: dict[str, bool] | None = None
    unclaimed: dict[str, Unclaimed] = field(default_factory=dict)
    containers: set[str] = field(default_factory=set)

    def keep(self, unclaimed: Unclaimed) -> None:
        """Note a container that no row claims."""
        if len(self.unclaimed) < MAX_UNCLAIMED:
            self.unclaimed[unclaimed.report.id] = unclaimed


@dataclass(frozen=True)
class ShownStatus:
    """What the API says of a container: its status, why when it is Error, and the last one known."""

    status: Status
    reason: str | None = None
    last: Status | None = None


class Fleet:
    """Nodes, containers and images in memory. `revision` grows with every change that a reader could see."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.nodes: dict[str, LiveNode] = {}
        self.containers: dict[str, LiveContainer] = {}
        self.images: dict[str, Image] = {}
        self.revision = 0

    # ------------------------------------------------------------ rows

    def load(
        self,
        nodes: Iterable[Node],
        containers: Iterable[Container],
        snapshots: Iterable[Snapshot],
        images: Iterable[Image],
    ) -> None:
        """Take over the rows at the controller's start."""
        for node in nodes:
            self.nodes[node.name] = LiveNode(node, since=timestamp(self._clock.now()))
        for container in containers:
            self._put_container(container)
        for snapshot in snapshots:
            self.containers[snapshot.container].snapshots[snapshot.name] = snapshot
        self.images = {image.fingerprint: image for image in images}

    def apply(self, changes: Sequence[Change]) -> None:
        """Mirror committed changes."""
        for change in changes:
            if change.kind is Container:
                self._apply_container(change)
            elif change.kind is Snapshot:
                self._apply_snapshot(change)
            elif change.kind is Node:
                self._apply_node(change)
            elif change.kind is Image:
                self._apply_image(change)
        self.revision += 1

    def _apply_container(self, change: Change) -> None:
        if isinstance(change.record, Container):
            self._put_container(change.record)
        elif change.key in self.containers:
            gone = self.containers.pop(change.key)
            if gone.record.node in self.nodes:
                self.nodes[gone.record.node].containers.discard(change.key)

    def _put_container(self, record: Container) -> None:
        live = self.containers.get(record.id)
        if live is None:
            live = self.containers[record.id] = LiveContainer(record)
        elif live.record.generation != record.generation:
            # Another incarnation: what was reported of the former says nothing about it.
            live.report, live.sample, live.sampled_at = None, None, None
        if live.record.node != record.node and live.record.node in self.nodes:
            self.nodes[live.record.node].containers.discard(record.id)
        if record.node in self.nodes:
            self.nodes[record.node].containers.add(record.id)
        live.record = record
        self._claim(live)
        self._touch(live)

    def _claim(self, live: LiveContainer) -> None:
        """Take over what its node has reported already, before the row said that it belongs there."""
        node = self.nodes.get(live.record.node)
        unclaimed = node.unclaimed.get(live.record.id) if node is not None else None
        if node is not None and unclaimed is not None and unclaimed.report.generation == live.record.generation:
            del node.unclaimed[live.record.id]
            live.report, live.sample, live.sampled_at = unclaimed.report, unclaimed.sample, unclaimed.sampled_at

    def _apply_snapshot(self, change: Change) -> None:
        container, _, name = change.key.partition("/")
        live = self.containers.get(container)
        if live is None:
            return
        if isinstance(change.record, Snapshot):
            live.snapshots[name] = change.record
        else:
            live.snapshots.pop(name, None)
        self._touch(live)

    def _apply_node(self, change: Change) -> None:
        if not isinstance(change.record, Node):
            self.nodes.pop(change.key, None)
        elif change.key in self.nodes:
            self.nodes[change.key].record = change.record
        else:
            self.nodes[change.key] = LiveNode(change.record, since=timestamp(self._clock.now()))

    def _apply_image(self, change: Change) -> None:
        if isinstance(change.record, Image):
            self.images[change.key] = change.record
        else:
            self.images.pop(change.key, None)

    def restore(self, name: str, kept: dict[str, Any]) -> None:
        """Take over what a node last reported before the controller restarted, until it reports again."""
        node = self.nodes.get(name)
        if node is None or node.status is NodeStatus.ONLINE:
            return
        node.last_seen = kept["last_seen"]
        for entry in kept["containers"]:
            report = msgspec.convert(entry["report"], ContainerReport)
            if self._belongs(name, report):
                live = self.containers[report.id]
                live.report, live.sampled_at = report, entry["sampled_at"]
                live.sample = msgspec.convert(entry["sample"], ContainerSample | None)
                self._touch(live)

    # ------------------------------------------------------------ what agents push

    def node_status(self, name: str, status: NodeStatus, reason: str) -> None:
        """A node became reachable or not; its containers' answers change with it."""
        node = self.nodes.get(name)
        if node is None:
            return
        now = timestamp(self._clock.now())
        if node.status is not status:
            node.since = now
        node.status, node.reason = status, reason
        if status is NodeStatus.ONLINE:
            node.last_seen = now
        self._touch_all(node.containers)

    def inventory(self, name: str, inventory: Inventory) -> None:
        """All that a node has. Containers that it no longer has lose their report; unknown ones are kept apart."""
        node = self.nodes.get(name)
        if node is None:
            return
        node.images = {image.fingerprint: image.mapped for image in inventory.images}
        node.last_seen = timestamp(self._clock.now())
        reports = {report.id: report for report in inventory.containers}
        node.unclaimed = {id: Unclaimed(report) for id, report in reports.items() if not self._belongs(name, report)}
        for container in node.containers:
            live = self.containers[container]
            report = reports.get(container)
            live.report = report if report is not None and self._belongs(name, report) else None
            self._touch(live)

    def samples(self, name: str, samples: Samples) -> None:
        """A batch of figures. Those of containers that are not this node's are dropped."""
        node = self.nodes.get(name)
        if node is None:
            return
        node.sample, node.sampled_at = samples.node, self._not_ahead(samples.sampled_at)
        node.last_seen = timestamp(self._clock.now())
        for sample in samples.containers:
            self._put_sample(name, sample, samples.sampled_at)
        self.revision += 1

    def state_changed(self, name: str, report: ContainerReport, removed: bool) -> None:
        """A container of this node changed by itself or by hand."""
        node = self.nodes.get(name)
        if node is None:
            return
        if not self._belongs(name, report):
            node.unclaimed.pop(report.id, None)
            if not removed:
                node.keep(Unclaimed(report))
        else:
            live = self.containers[report.id]
            live.report = None if removed else report
            self._touch(live)
        self.revision += 1

    def outcome(self, name: str, outcome: Outcome, sampled_at: float | None) -> None:
        """What a command led to, known before its operation ends."""
        report = outcome.container
        if report is not None and not self._belongs(name, report):
            # A move or a rename: the row that claims it is written when the operation gets there.
            if name in self.nodes:
                at = None if sampled_at is None else self._not_ahead(sampled_at)
                self.nodes[name].keep(Unclaimed(report, outcome.sample, at))
            return
        if report is not None:
            live = self.containers[report.id]
            live.report = report
            self._touch(live)
        if outcome.sample is not None and sampled_at is not None:
            self._put_sample(name, outcome.sample, sampled_at)

    def gone(self, name: str, container: str) -> None:
        """A command removed this container from the node: if no row claims it, it is forgotten."""
        if name in self.nodes:
            self.nodes[name].unclaimed.pop(container, None)

    def _put_sample(self, name: str, sample: ContainerSample, sampled_at: float) -> None:
        live = self.containers.get(sample.id)
        at = self._not_ahead(sampled_at)
        if live is None or live.record.node != name:
            return
        # A batch that was taken before the latest figure (an operation's own) does not replace it.
        if live.sampled_at is not None and 0 < live.sampled_at - at < CLOCK_STEP:
            return
        live.sample, live.sampled_at = sample, at
        self._touch(live)

    def _not_ahead(self, sampled_at: float) -> float:
        """A time by an agent's clock, which may be wrong: nothing was sampled in the future, or before 1970."""
        return max(0.0, min(sampled_at, self._clock.now().timestamp()))

    def _belongs(self, name: str, report: ContainerReport) -> bool:
        live = self.containers.get(report.id)
        return live is not None and live.record.node == name and live.record.generation == report.generation

    def _touch(self, live: LiveContainer) -> None:
        live.version += 1
        live.rendered.clear()
        self.revision += 1

    def _touch_all(self, containers: Iterable[str]) -> None:
        for container in containers:
            self._touch(self.containers[container])

    # ------------------------------------------------------------ what readers ask

    def status_of(self, live: LiveContainer) -> ShownStatus:
        """The status of a container as the API shows it."""
        record = live.record
        last = _known(live.report.status) if live.report is not None else None
        if record.phase is Phase.CREATING:
            return ShownStatus(Status.PENDING)
        if record.phase is Phase.FAILED:
            return ShownStatus(Status.ERROR, record.error, last)
        node = self.nodes.get(record.node)
        if node is None or node.status not in (NodeStatus.ONLINE, NodeStatus.SUSPECT):
            reason = f"node {record.node} is out of reach: {node.reason if node else 'unknown'}"
            return ShownStatus(Status.ERROR, reason, last)
        if live.report is None or last is None:
            return ShownStatus(Status.ERROR, f"node {record.node} does not have this container")
        return ShownStatus(last, live.report.reason if last is Status.ERROR else None)

    def generations(self, node: str) -> dict[str, int]:
        """The containers that belong to a node by the controller's word."""
        live = self.nodes.get(node)
        owned = live.containers if live is not None else set()
        return {container: self.containers[container].record.generation for container in sorted(owned)}


def _known(status: int) -> Status:
    """The status of an agent's report; a code that no container can have is an error of that node alone."""
    return Status(status) if status in CONTAINER_STATES else Status.ERROR
