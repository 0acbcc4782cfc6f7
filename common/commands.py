"""The table of commands: what a controller may have a node do, with typed arguments and a time-out class."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from msgspec import Struct

from common.reports import ContainerSpec, Count, ImageSpec, Name, Text


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
        CommandSpec(AdoptContainer, TimeoutClass.SLOW),
        CommandSpec(SettleAdoption, TimeoutClass.NORMAL),
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
    | AdoptContainer
    | SettleAdoption
)


def target_of(arguments: Arguments) -> str | None:
    """The id of the container on which a command works, whose lock it takes; None for images."""
    spec: ContainerSpec | None = getattr(arguments, "spec", None)
    container: str | None = getattr(arguments, "container", None)
    return container if container is not None else (spec.id if spec is not None else None)
