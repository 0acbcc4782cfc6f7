"""The table of commands: what a controller may have a node do, with typed arguments and a time-out class."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from msgspec import Struct

from common.reports import ContainerSpec, Count, ImageSpec, Name, Record, Text


class Arguments(Struct, frozen=True, omit_defaults=True, tag_field="name"):
    """Base of the arguments of all commands; the tag is the command's name."""


class EnsureImage(Arguments, frozen=True, tag="image.ensure"):
    """Have the image on the node, unpacked for this kind of container."""

    image: ImageSpec
    privileged: bool = False


class DropImage(Arguments, frozen=True, tag="image.drop"):
    """Remove the image from the node; containers made from it stay."""

    fingerprint: Name


class PublishContainer(Arguments, frozen=True, tag="image.publish"):
    """Pack a container, or its snapshot, as an image in LXD's unified format, and upload it to the controller.

    A running one only with `force`, as it is at one moment. `architecture`, `created_at` (seconds since 1970) and
    `properties` stand in the image's metadata.yaml; `limit` is the most bytes that the file may have. `path` below the
    controller's HTTPS address takes it, under `token`.
    """

    container: Name
    path: Text
    token: Text
    compression: Name
    architecture: Name
    created_at: Count
    limit: Count
    properties: dict[Name, Text] = {}
    snapshot: Name | None = None
    force: bool = False


class CreateContainer(Arguments, frozen=True, tag="container.create"):
    """Make a container: from an image that is on the node, or with an empty root when `image` is None."""

    spec: ContainerSpec
    image: Name | None


class CopyContainer(Arguments, frozen=True, tag="container.copy"):
    """Make a container from another one on this node, or from one of its snapshots.

    `refresh`: `spec`'s container is there and stopped, and gets the source's files; it keeps its own till it has them.
    """

    spec: ContainerSpec
    source: Name
    snapshot: Name | None = None
    refresh: bool = False


class Route(Record, frozen=True):
    """The way of one round of a transfer, as one end sees it.

    `transfer` is the operation's id, `round` counts from 0. `peer` is the node at the other end, `peer_key` its CURVE
    public key (Z85). `token` is the same at both ends and binds the connection to this round and attempt. One of
    `address` (`tcp://HOST:PORT` where the receiver listens) and `relay` (a path below the controller's HTTPS address,
    with this end's tokens for its two directions) is set. `rate`: bytes per second at most.
    """

    transfer: Name
    round: Count
    peer: Name
    peer_key: Name
    token: Text
    address: Text | None = None
    relay: Text | None = None
    relay_put: Text = ""
    relay_get: Text = ""
    rate: Count | None = None


class SendContainer(Arguments, frozen=True, tag="container.send"):
    """Send a container's data to another node, in `format` `btrfs` or `files`; one round of a transfer.

    `moving`: rounds before the `last` are taken while it may run, for the `last` it must be stopped. Otherwise it is a
    copy in one round: of `snapshot`, or of a snapshot that is taken for it. What the next round needs of this one is
    kept until `transfer.end`.
    """

    container: Name
    route: Route
    format: Name
    last: bool
    moving: bool
    snapshot: Name | None = None
    with_snapshots: bool = False


class ReceiveContainer(Arguments, frozen=True, tag="container.receive"):
    """Take what `container.send` sends; with the `last` round `spec`'s container is there.

    `refresh`: it is there already, stopped, and gets the source's files; it keeps its own till it has them all.
    """

    spec: ContainerSpec
    route: Route
    format: Name
    last: bool
    refresh: bool = False


class EndTransfer(Arguments, frozen=True, tag="transfer.end"):
    """Remove what is kept for a transfer's next round. Absent is success."""

    container: Name
    transfer: Name


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


class RenameSnapshot(Arguments, frozen=True, tag="snapshot.rename"):
    """Call a snapshot `new`. One that is called so already, and not `snapshot` any more, is success."""

    container: Name
    snapshot: Name
    new: Name


class AdoptContainer(Arguments, frozen=True, tag="container.adopt"):
    """Take a container that is there, of generation `found` (0: not made by vzfleet), into management as `spec`.

    What it was before is kept until the adoption is settled.
    """

    spec: ContainerSpec
    found: Count


class SettleAdoption(Arguments, frozen=True, tag="container.settle"):
    """Forget what an adopted container was before, or (not `keep`) make it that again. Settled is success."""

    container: Name
    keep: bool


class TimeoutClass(Enum):
    """How long a command may take once begun, in seconds; what carries its own time-out adds this to it."""

    FAST = 30
    NORMAL = 120
    SLOW = 3600
    TRANSFER = 24 * 3600


COMPRESSION_ALGORITHMS = ("gzip", "zstd", "xz", "none")
"""What an image that is published can be compressed with."""
FORMATS = ("btrfs", "files")
"""How a container's data travel: btrfs streams of subvolumes, or files by rsync."""


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
        CommandSpec(PublishContainer, TimeoutClass.SLOW),
        CommandSpec(CreateContainer, TimeoutClass.NORMAL),
        CommandSpec(CopyContainer, TimeoutClass.SLOW),
        CommandSpec(SendContainer, TimeoutClass.TRANSFER),
        CommandSpec(ReceiveContainer, TimeoutClass.TRANSFER),
        CommandSpec(EndTransfer, TimeoutClass.NORMAL),
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
        CommandSpec(RenameSnapshot, TimeoutClass.FAST),
        CommandSpec(AdoptContainer, TimeoutClass.SLOW),
        CommandSpec(SettleAdoption, TimeoutClass.NORMAL),
    )
}

AnyArguments = (
    EnsureImage
    | DropImage
    | PublishContainer
    | CreateContainer
    | CopyContainer
    | SendContainer
    | ReceiveContainer
    | EndTransfer
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
    | RenameSnapshot
    | AdoptContainer
    | SettleAdoption
)


def target_of(arguments: Arguments) -> str | None:
    """The id of the container on which a command works, whose lock it takes; None for images."""
    spec: ContainerSpec | None = getattr(arguments, "spec", None)
    container: str | None = getattr(arguments, "container", None)
    return container if container is not None else (spec.id if spec is not None else None)
