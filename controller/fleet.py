"""The fleet as the controller knows it now: rows of nodes and containers, and their live state with its age.

A mirror of committed rows plus what agents pushed. No SQL, no waiting: every read of the API is answered from here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from common.clock import Clock, timestamp
from common.messages import Inventory, Outcome, Samples
from common.reports import ContainerReport, ContainerSample
from common.states import NodeStatus
from controller.live import CLOCK_STEP, LiveContainer, LiveNode, ShownStatus, Unclaimed, shown_status
from controller.records import Change, Container, Image, Node, Phase, Snapshot

LARGEST_ERROR = 1e10
"""Seconds by which an agent's clock is believed to be wrong at most: what agents send is shown."""


class Watch(Protocol):
    """What hears of changes by which containers may have drifted, or become somebody's. Both calls are quick."""

    def container_changed(self, container: str) -> None:
        """Its row, its report, its snapshots or its node changed; or it is gone."""
        ...

    def unmanaged_changed(self, node: str) -> None:
        """A node may have other containers of nobody's."""
        ...


class Fleet:
    """Nodes, containers and images in memory. `revision` grows with every change that a reader could see.

    `sampled` hears which containers have new figures, `watch` what else changes.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.sampled: Callable[[Collection[str]], None] | None = None
        self.watch: Watch | None = None
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
            node = self.nodes.get(gone.record.node)
            if node is not None:
                node.containers.discard(change.key)
                if gone.record.phase is Phase.CREATING and gone.report is not None:
                    # Its row was given up, and it is there.
                    node.keep(Unclaimed(gone.report, gone.sample, gone.sampled_at))
                self._unclaimed_changed(gone.record.node, [change.key])
            if self.watch is not None:
                self.watch.container_changed(change.key)

    def _put_container(self, record: Container) -> None:
        live = self.containers.get(record.id)
        if live is None:
            live = self.containers[record.id] = LiveContainer(record)
        if live.record.node != record.node and live.record.node in self.nodes:
            self.nodes[live.record.node].containers.discard(record.id)
        if record.node in self.nodes:
            self.nodes[record.node].containers.add(record.id)
        live.take_record(record)
        self._claim(live)
        self._touch(live)

    def _claim(self, live: LiveContainer) -> None:
        """Take over what its node has reported already, before the row said that it belongs there."""
        node = self.nodes.get(live.record.node)
        unclaimed = node.unclaimed.get(live.record.id) if node is not None else None
        if node is not None and unclaimed is not None and unclaimed.report.generation == live.record.generation:
            del node.unclaimed[live.record.id]
            self._unclaimed_changed(live.record.node, [])
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
            node = self.nodes[change.key]
            node.record = change.record
            for container in node.containers:
                self._touch(self.containers[container])
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
        node.take_status(status, reason, timestamp(self._clock.now()))
        for container in node.containers:
            self._touch(self.containers[container])

    def inventory(self, name: str, inventory: Inventory) -> None:
        """All that a node has. Containers that it no longer has lose their report; unknown ones are kept apart."""
        node = self.nodes.get(name)
        if node is None:
            return
        node.images = {image.fingerprint: image.mapped for image in inventory.images}
        node.last_seen = timestamp(self._clock.now())
        reports = {report.id: report for report in inventory.containers}
        before = node.unclaimed
        node.unclaimed = {id: Unclaimed(report) for id, report in reports.items() if not self._belongs(name, report)}
        self._unclaimed_changed(name, before.keys() | node.unclaimed.keys())
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
        ahead = samples.sampled_at - self._clock.now().timestamp()
        node.clock_error = max(-LARGEST_ERROR, min(LARGEST_ERROR, ahead)) if abs(ahead) > CLOCK_STEP else 0.0
        node.sample, node.sampled_at = samples.node, self._by_our_clock(samples.sampled_at)
        node.last_seen = timestamp(self._clock.now())
        new = [sample.id for sample in samples.containers if self._put_sample(name, sample, samples.sampled_at)]
        self._tell_sampled(new)
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
                self._replaced(name, report.id)
            self._unclaimed_changed(name, [report.id])
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
                at = None if sampled_at is None else self._by_our_clock(sampled_at)
                live = self.containers.get(report.id)
                expected = live is None or report.generation > live.record.generation
                self.nodes[name].keep(Unclaimed(report, outcome.sample, at, expected))
                self._replaced(name, report.id)
                self._unclaimed_changed(name, [report.id])
            return
        if report is not None:
            live = self.containers[report.id]
            live.report = report
            if self.nodes[name].unclaimed.pop(report.id, None) is not None:
                self._unclaimed_changed(name, [])  # it was adopted
            self._touch(live)
        sample = outcome.sample
        if sample is not None and sampled_at is not None and self._put_sample(name, sample, sampled_at):
            self._tell_sampled([sample.id])

    def _replaced(self, name: str, container: str) -> None:
        """A node has another container under this id, so that it has the row's no more."""
        live = self.containers.get(container)
        if live is not None and live.record.node == name:
            live.report = None

    def gone(self, name: str, container: str) -> None:
        """A command removed this container from the node: what was reported of it there holds no more."""
        if name in self.nodes:
            self.nodes[name].unclaimed.pop(container, None)
            self._unclaimed_changed(name, [container])
        live = self.containers.get(container)
        # A whole one that is being deleted is shown as it was until its row goes.
        if live is not None and live.record.node == name and live.record.phase is not Phase.READY:
            live.report = None
            self._touch(live)

    def _put_sample(self, name: str, sample: ContainerSample, sampled_at: float) -> bool:
        live = self.containers.get(sample.id)
        if live is None or live.record.node != name or not live.take_sample(sample, self._by_our_clock(sampled_at)):
            return False
        live.rendered.clear()
        self.revision += 1
        return True

    def _tell_sampled(self, containers: Collection[str]) -> None:
        if self.sampled is not None and containers:
            self.sampled(containers)

    def _by_our_clock(self, sampled_at: float) -> float:
        """A time by an agent's clock, which may be wrong. Figures are told at once: by far older ones are of now."""
        now = self._clock.now().timestamp()
        return now if abs(now - sampled_at) > CLOCK_STEP else min(sampled_at, now)

    def _belongs(self, name: str, report: ContainerReport) -> bool:
        live = self.containers.get(report.id)
        return live is not None and live.record.node == name and live.record.generation == report.generation

    def _touch(self, live: LiveContainer) -> None:
        live.rendered.clear()
        live.drift = None
        self.revision += 1
        if self.watch is not None:
            self.watch.container_changed(live.record.id)

    def _unclaimed_changed(self, node: str, containers: Iterable[str]) -> None:
        """Other containers of nobody's are on a node: where one of these ids runs elsewhere, that is drift."""
        for container in containers:
            if container in self.containers:
                self._touch(self.containers[container])
        self.revision += 1
        if self.watch is not None:
            self.watch.unmanaged_changed(node)

    # ------------------------------------------------------------ what readers ask

    def status_of(self, live: LiveContainer) -> ShownStatus:
        """The status of a container as the API shows it."""
        return shown_status(live, self.nodes.get(live.record.node))

    def generations(self, node: str) -> dict[str, int]:
        """The containers that belong to a node by the controller's word."""
        live = self.nodes.get(node)
        owned = live.containers if live is not None else set()
        return {container: self.containers[container].record.generation for container in sorted(owned)}
