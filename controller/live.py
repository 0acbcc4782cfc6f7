"""What the controller knows now of one container and of one node: its row, what was reported of it, and its figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.reports import ContainerReport, ContainerSample, NodeSample
from common.states import CONTAINER_STATES, NodeStatus, Status
from controller.drift import Drift
from controller.records import Container, Node, NodeMode, Phase, Snapshot

MAX_UNCLAIMED = 10_000
"""Containers of nobody that are kept for a node: what agents send must not fill the memory."""
CLOCK_STEP = 60.0
"""Seconds; figures that are older than the present ones by more come from a clock that was set back."""


@dataclass
class Unclaimed:
    """A container on a node of which no row says that it belongs there: made by hand, or about to be claimed.

    `expected`: a command of an operation has just made it, whose row is written when the operation gets there.
    """

    report: ContainerReport
    sample: ContainerSample | None = None
    sampled_at: float | None = None
    expected: bool = False


@dataclass
class LiveContainer:
    """A container's row, what its node last reported of it, and its last figures with their time."""

    record: Container
    report: ContainerReport | None = None
    sample: ContainerSample | None = None
    sampled_at: float | None = None
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    rendered: dict[str, bytes] = field(default_factory=dict)
    """Answers of the API as bytes, by kind; dropped at every change."""
    drift: tuple[Drift, ...] | None = None
    """Its differences, once somebody has asked; dropped at every change but those of figures."""

    @property
    def figures(self) -> ContainerSample:
        """Its last figures as far as they still hold: one that has stopped has no address, processes or memory."""
        sample = self.sample or ContainerSample(self.record.id)
        if self.report is None or self.report.status != Status.STOPPED:
            return sample
        return ContainerSample(sample.id, disk_limit=sample.disk_limit, disk_usage=sample.disk_usage)

    def take_record(self, record: Container) -> None:
        """Take over its row. Another incarnation has reported nothing yet."""
        if self.record.generation != record.generation:
            self.report, self.sample, self.sampled_at = None, None, None
        self.record = record

    def take_sample(self, sample: ContainerSample, at: float) -> bool:
        """Take over figures, and say whether they are new.

        A batch that was taken before the latest figure (an operation's own) does not replace it.
        """
        if self.sampled_at is not None and 0 < self.sampled_at - at < CLOCK_STEP:
            return False
        self.sample, self.sampled_at = sample, at
        return True


@dataclass
class LiveNode:
    """A node's row, its status with the reason, and its load.

    `images` are those it holds, each with whether it is ready for containers with an id map; None: no inventory yet.
    `clock_error` is by how many seconds its wall clock is ahead of ours, 0 unless that is more than CLOCK_STEP.
    `returning` says what is done before it counts as back, and is empty while nothing is.
    """

    record: Node
    status: NodeStatus = NodeStatus.OFFLINE
    reason: str = "not connected since the controller started"
    since: str = ""
    last_seen: str | None = None
    sample: NodeSample | None = None
    sampled_at: float | None = None
    clock_error: float = 0.0
    images: dict[str, bool] | None = None
    unclaimed: dict[str, Unclaimed] = field(default_factory=dict)
    containers: set[str] = field(default_factory=set)
    returning: str = ""

    @property
    def reachable(self) -> bool:
        """Whether it can be spoken with."""
        return self.status in (NodeStatus.ONLINE, NodeStatus.SUSPECT) and self.record.mode is not NodeMode.FENCED

    @property
    def shown(self) -> NodeStatus:
        """Its status by what is known of it and by what an operator decided."""
        if self.reachable:
            return NodeStatus.DRAINING if self.record.mode is NodeMode.DRAINING else self.status
        return NodeStatus.OFFLINE

    @property
    def fence(self) -> str:
        """Who fenced it and when; empty when nobody has."""
        record = self.record
        return f"fenced by {record.fenced_by} at {record.fenced_at}" if record.fenced_at is not None else ""

    @property
    def message(self) -> str:
        """Why it is shown as it is."""
        if self.returning:
            return f"{self.fence}; {self.returning}" if self.fence else self.returning
        if self.record.mode is NodeMode.FENCED:
            return self.fence
        if self.record.mode is NodeMode.DRAINING and self.reachable:
            came_back = f"it is back after it was {self.fence}; " if self.fence else ""
            return f"{came_back}no new containers until it is restored, {len(self.containers)} are on it"
        return self.reason

    def take_status(self, status: NodeStatus, reason: str, now: str) -> None:
        """It became reachable or not, at `now`."""
        if self.status is not status:
            self.since = now
        self.status, self.reason = status, reason
        if status is NodeStatus.ONLINE:
            self.last_seen = now

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


def shown_status(live: LiveContainer, node: LiveNode | None) -> ShownStatus:
    """The status of a container that belongs to `node` by its row."""
    record = live.record
    last = _known(live.report.status) if live.report is not None else None
    if record.phase is Phase.CREATING:
        return ShownStatus(Status.PENDING)
    if record.phase is Phase.FAILED:
        return ShownStatus(Status.ERROR, record.error, last)
    if node is None or not node.reachable:
        reason = f"node {record.node} is out of reach: {node.message if node else 'unknown'}"
        return ShownStatus(Status.ERROR, reason, last)
    if live.report is None or last is None:
        return ShownStatus(Status.ERROR, f"node {record.node} does not have this container")
    return ShownStatus(last, live.report.reason if last is Status.ERROR else None)


def _known(status: int) -> Status:
    """The status of an agent's report; a code that no container can have is an error of that node alone."""
    return Status(status) if status in CONTAINER_STATES else Status.ERROR
