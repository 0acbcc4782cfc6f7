"""Every message between controller and agent, typed; unknown fields are ignored, unknown messages refused.

The protocol number grows when a message changes its meaning; adding a field with a default does not need that.
The controller speaks PROTOCOL and the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

PROTOCOL = 1
OLDEST_PROTOCOL = 1

Text = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(max_length=128)]
Key = Annotated[str, Meta(max_length=160)]
Share = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Record(Struct, frozen=True, omit_defaults=True):
    """A part of a message."""


# ---------------------------------------------------------------- what a node and its containers are


class WireError(Record, frozen=True):
    """An error that crosses the wire: a code of `common.errors` and its text."""

    code: Name
    text: Text
    field: Text | None = None
    allowed: Text | None = None


class NodeFacts(Record, frozen=True):
    """What does not change while an agent runs. Memory and disk in bytes; `storage` is `btrfs` or `dir`."""

    hostname: Name
    architecture: Name
    cpus: Count
    memory: Count
    disk: Count
    driver: Name
    driver_version: Name
    storage: Name
    kernel: Name
    cgroup: Name
    agent_version: Name
    subnet: Name | None = None
    capabilities: tuple[Name, ...] = ()


class NodeSample(Record, frozen=True):
    """A node's load. Bytes; `cpu_load` is a share of all CPUs over the last interval, 0 to 1."""

    memory_free: Count
    disk_free: Count
    cpu_load: Share | None
    load_average: tuple[float, float, float]
    uptime: float


class Address(Record, frozen=True):
    """An address of a container's interface; `family` is `inet` or `inet6`, `scope` LXD's global, local or link."""

    family: Name
    address: Name
    netmask: Name
    scope: Name


class Interface(Record, frozen=True):
    """A network interface inside a container with its counters since it started (bytes and packets)."""

    name: Name
    hwaddr: Name
    mtu: Count
    up: bool
    host_name: Name | None
    addresses: tuple[Address, ...]
    bytes_received: Count
    bytes_sent: Count
    packets_received: Count
    packets_sent: Count
    errors_received: Count = 0
    errors_sent: Count = 0
    dropped_received: Count = 0
    dropped_sent: Count = 0


class ContainerSample(Record, frozen=True):
    """A container's figures at one moment. None is "not known", never a made-up 0.

    Bytes; `cpu_time` in nanoseconds since its start; `cpu_load` is the share of the CPUs allotted to it, 0 to 1.
    """

    id: Name
    disk_limit: Count | None = None
    disk_usage: Count | None = None
    memory_limit: Count | None = None
    memory_usage: Count | None = None
    memory_reclaimable: Count | None = None
    memory_peak: Count | None = None
    swap_usage: Count | None = None
    cpu_time: Count | None = None
    cpu_load: Share | None = None
    processes: Count | None = None
    pid: Count | None = None
    started_at: float | None = None
    interfaces: tuple[Interface, ...] = ()


class SnapshotReport(Record, frozen=True):
    """A snapshot that exists on a node; `created_at` in seconds since 1970."""

    name: Name
    created_at: float


class ContainerReport(Record, frozen=True):
    """A container that exists on a node. `generation` 0 means that no controller ever made it (unmanaged).

    `status` is a code of `common.states.Status`; `reason` says why when it is Error.
    """

    id: Name
    generation: Count
    status: int
    config: dict[Key, Text] = {}
    hostname: Text = ""
    reason: Text | None = None
    pid: Count | None = None
    snapshots: tuple[SnapshotReport, ...] = ()


class ImageReport(Record, frozen=True):
    """An image that a node holds. `size` in bytes on the node; `mapped`: ready for containers with an id map."""

    fingerprint: Name
    size: Count
    mapped: bool = True


class ContainerSpec(Record, frozen=True):
    """All that a node must know to run a container. `hwaddr` is chosen by the controller and stays for life."""

    id: Name
    generation: Count
    hostname: Text
    hwaddr: Name
    config: dict[Key, Text]


class ImageSpec(Record, frozen=True):
    """An image to be on the node. `layout` is `unified` (LXD: metadata.yaml and rootfs/) or `rootfs`; `size` in bytes.

    `path` is below the controller's HTTPS address, `token` good for that file and this operation only.
    """

    fingerprint: Name
    layout: Name
    size: Count
    path: Text
    token: Text


# ---------------------------------------------------------------- messages of the agent


class Hello(Record, frozen=True, tag="hello"):
    """First message of a connection. `boot_id` is the kernel's; `instance` is new with each start of the agent."""

    oldest: Count
    newest: Count
    version: Name
    boot_id: Name
    machine_id: Name
    instance: Name
    connection: Count
    monotonic: float


class Inventory(Record, frozen=True, tag="inventory"):
    """All that the node has; answers WELCOME and is repeated every few minutes."""

    facts: NodeFacts
    containers: tuple[ContainerReport, ...]
    images: tuple[ImageReport, ...]


class Heartbeat(Record, frozen=True, tag="heartbeat"):
    """The agent lives. `monotonic` is its clock (the base of `expires_at`), `lag` its event loop's delay in seconds."""

    sequence: Count
    monotonic: float
    lag: float


class Accepted(Record, frozen=True, tag="accepted"):
    """The command stands in the agent's journal and will be carried out or answered with an error."""

    command: Name


class Progress(Record, frozen=True, tag="progress"):
    """How far a command is; `percent` 0 to 100, the rest as far as it is known (bytes, bytes per second)."""

    command: Name
    stage: Name
    percent: int | None = None
    processed: Count | None = None
    speed: Count | None = None


class Outcome(Record, frozen=True):
    """What a command led to: the container and its figures after it, or what was transferred."""

    container: ContainerReport | None = None
    sample: ContainerSample | None = None
    bytes: Count | None = None


class Result(Record, frozen=True, tag="result"):
    """The end of a command. Exactly one of `outcome` and `error` is set. Sent again until it is acknowledged."""

    command: Name
    outcome: Outcome | None = None
    error: WireError | None = None
    sampled_at: float | None = None


class Samples(Record, frozen=True, tag="samples"):
    """The figures of all running containers; `sampled_at` in seconds since 1970 by the agent's wall clock."""

    sampled_at: float
    node: NodeSample
    containers: tuple[ContainerSample, ...]


class StateChanged(Record, frozen=True, tag="state-changed"):
    """A container changed by itself or by hand: it died, stopped, was started or removed on the host."""

    container: ContainerReport
    removed: bool = False


# ---------------------------------------------------------------- messages of the controller


class Welcome(Record, frozen=True, tag="welcome"):
    """Answers HELLO. `epoch` grows with each start of the controller; intervals in seconds."""

    protocol: Count
    node: Name
    epoch: Count
    session: Name
    heartbeat_interval: float
    heartbeat_timeout: float
    sample_interval: float


class Refused(Record, frozen=True, tag="refused"):
    """The controller will not speak with this agent; it says why and closes."""

    code: Name
    text: Text


class Ping(Record, frozen=True, tag="ping"):
    """The controller lives."""

    sequence: Count


class ResultAcknowledged(Record, frozen=True, tag="result-acknowledged"):
    """The results of these commands are committed: the agent may forget them."""

    commands: tuple[Name, ...]


class Confirm(Record, frozen=True, tag="confirm"):
    """The controller's word which containers belong to this node: id to generation. Allows autostart."""

    generations: dict[Name, Count]


class Abandon(Record, frozen=True, tag="abandon"):
    """Give this command up if it has not ended; its Result tells how it ended."""

    command: Name


# ---------------------------------------------------------------- commands


class Arguments(Struct, frozen=True, omit_defaults=True, tag_field="name"):
    """Base of the arguments of all commands; the tag is the command's name."""


class EnsureImage(Arguments, frozen=True, tag="image.ensure"):
    """Have the image on the node, unpacked for this kind of container."""

    image: ImageSpec
    privileged: bool = False


class DropImage(Arguments, frozen=True, tag="image.drop"):
    """Remove the image from the node; containers made from it stay."""

    fingerprint: Name


class CreateContainer(Arguments, frozen=True, tag="container.create"):
    """Make a container: from an image that is on the node, or with an empty root when `image` is None."""

    spec: ContainerSpec
    image: Name | None


class CopyContainer(Arguments, frozen=True, tag="container.copy"):
    """Make a container from another one on this node, or from one of its snapshots."""

    spec: ContainerSpec
    source: Name
    snapshot: Name | None = None


class SendContainer(Arguments, frozen=True, tag="container.send"):
    """Send a stopped container's data (or a snapshot's) to the controller's relay, snapshots first if wanted."""

    container: Name
    path: Text
    token: Text
    snapshot: Name | None = None
    with_snapshots: bool = False


class ReceiveContainer(Arguments, frozen=True, tag="container.receive"):
    """Make a container from what `container.send` puts into the relay."""

    spec: ContainerSpec
    path: Text
    token: Text


class DeleteContainer(Arguments, frozen=True, tag="container.delete"):
    """Remove a container with its snapshots; stops it first when `force`. Absent is success.

    One of another generation is not the one that is meant, and stays.
    """

    container: Name
    generation: Count
    force: bool = False


class StartContainer(Arguments, frozen=True, tag="container.start"):
    """Start it; running is success."""

    container: Name


class StopContainer(Arguments, frozen=True, tag="container.stop"):
    """Stop it: by its init within `timeout` seconds, or by force. Stopped is success."""

    container: Name
    timeout: float
    force: bool = False


class FreezeContainer(Arguments, frozen=True, tag="container.freeze"):
    """Freeze all its processes; frozen is success."""

    container: Name


class UnfreezeContainer(Arguments, frozen=True, tag="container.unfreeze"):
    """Let its processes go on; running is success."""

    container: Name


class UpdateContainer(Arguments, frozen=True, tag="container.update"):
    """Write a new configuration or hostname; what can change while it runs applies at once."""

    spec: ContainerSpec


class RenameContainer(Arguments, frozen=True, tag="container.rename"):
    """Give a stopped container another id, and the rest of `spec`."""

    container: Name
    spec: ContainerSpec


class CreateSnapshot(Arguments, frozen=True, tag="snapshot.create"):
    """Take a crash-consistent snapshot."""

    container: Name
    snapshot: Name


class DeleteSnapshot(Arguments, frozen=True, tag="snapshot.delete"):
    """Remove a snapshot; absent is success."""

    container: Name
    snapshot: Name


class RestoreSnapshot(Arguments, frozen=True, tag="snapshot.restore"):
    """Put a stopped container's files back to what a snapshot holds."""

    container: Name
    snapshot: Name


class TimeoutClass(Enum):
    """How long a command may take once begun, in seconds; what carries its own time-out adds this to it."""

    FAST = 30
    NORMAL = 120
    SLOW = 3600


@dataclass(frozen=True)
class CommandSpec:
    """A row of the command table. `container` tells which lock it takes: the id that it works on, or None."""

    arguments: type[Arguments]
    timeout: TimeoutClass

    @property
    def name(self) -> str:
        """The command's name on the wire."""
        return str(self.arguments.__struct_config__.tag)


COMMANDS: dict[type[Arguments], CommandSpec] = {
    spec.arguments: spec
    for spec in (
        CommandSpec(EnsureImage, TimeoutClass.SLOW),
        CommandSpec(DropImage, TimeoutClass.NORMAL),
        CommandSpec(CreateContainer, TimeoutClass.NORMAL),
        CommandSpec(CopyContainer, TimeoutClass.SLOW),
        CommandSpec(SendContainer, TimeoutClass.SLOW),
        CommandSpec(ReceiveContainer, TimeoutClass.SLOW),
        CommandSpec(DeleteContainer, TimeoutClass.NORMAL),
        CommandSpec(StartContainer, TimeoutClass.NORMAL),
        CommandSpec(StopContainer, TimeoutClass.NORMAL),
        CommandSpec(FreezeContainer, TimeoutClass.FAST),
        CommandSpec(UnfreezeContainer, TimeoutClass.FAST),
        CommandSpec(UpdateContainer, TimeoutClass.FAST),
        CommandSpec(RenameContainer, TimeoutClass.NORMAL),
        CommandSpec(CreateSnapshot, TimeoutClass.NORMAL),
        CommandSpec(DeleteSnapshot, TimeoutClass.NORMAL),
        CommandSpec(RestoreSnapshot, TimeoutClass.NORMAL),
    )
}

AnyArguments = (
    EnsureImage
    | DropImage
    | CreateContainer
    | CopyContainer
    | SendContainer
    | ReceiveContainer
    | DeleteContainer
    | StartContainer
    | StopContainer
    | FreezeContainer
    | UnfreezeContainer
    | UpdateContainer
    | RenameContainer
    | CreateSnapshot
    | DeleteSnapshot
    | RestoreSnapshot
)


class Command(Record, frozen=True, tag="command"):
    """An order to the agent, carried out at most once for its `id` (`<operation>/<step>/<do or undo>`).

    `expires_at` is on the agent's own monotonic clock: after that it must not begin. A `session`, `epoch` or
    `generation` older than the agent's is refused. `request` is the REST call's id, for the logs.
    """

    id: Name
    epoch: Count
    session: Name
    generation: Count
    expires_at: float
    arguments: AnyArguments
    request: Name = ""


def target_of(arguments: Arguments) -> str | None:
    """The id of the container on which a command works, whose lock it takes; None for images."""
    spec: ContainerSpec | None = getattr(arguments, "spec", None)
    container: str | None = getattr(arguments, "container", None)
    return container if container is not None else (spec.id if spec is not None else None)


AgentMessage = Hello | Inventory | Heartbeat | Accepted | Progress | Result | Samples | StateChanged
ControllerMessage = Welcome | Refused | Ping | ResultAcknowledged | Confirm | Abandon | Command


def to_plain(message: Any) -> Any:
    """A message as plain maps and lists, ready for msgpack or JSON."""
    return msgspec.to_builtins(message)
