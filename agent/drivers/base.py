"""What the agent asks of a way to run containers.

Every method that changes something is idempotent: what is already so is success. After a crash the same call is
made again, and rolls forward or starts afresh; a half-made container is never visible. Errors are those of
`common.errors`; a call may be cancelled at any await and then leaves nothing half done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.channel.base import Channel
from common.reports import ContainerReport, ContainerSample, ContainerSpec, ImageReport, NodeFacts, NodeSample

ReportProgress = Callable[[str, int | None], None]
"""Called with a stage ("unpacking") and a percentage, or None where that is not known."""

ReportTransfer = Callable[[str, int, int | None], None]
"""Called with a stage ("files", "snapshot one"), the bytes of this round so far, and how many they will be or None."""

StateListener = Callable[[ContainerReport, bool], None]
"""Called when a container changed by itself; the second argument says that it is gone."""


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do beyond the methods below. `transfers`: `send` and `receive` work in any format."""

    disk_limits: bool
    snapshots: bool
    privileged: bool
    transfers: bool


Format = Literal["btrfs", "files"]
"""How a container's data travel: as a btrfs send stream, or file by file (by rsync)."""


@dataclass(frozen=True)
class Outgoing:
    """One round of a transfer at the node that has the container. `transfer` is the same in all rounds, from 0.

    `moving`: the rounds before `last` are taken while it runs, and for `last` it must be stopped. Otherwise it is a
    copy in one round, of `snapshot` or of the container as it is, running or not.
    """

    container: str
    transfer: str
    round: int
    format: Format
    last: bool
    moving: bool
    snapshot: str | None = None
    with_snapshots: bool = False


@dataclass(frozen=True)
class Incoming:
    """One round of a transfer at the node that gets the container, which appears there with the `last` one.

    `refresh`: it is there already, stopped, and gets the files of the source; its identity and limits stay.
    """

    spec: ContainerSpec
    transfer: str
    round: int
    format: Format
    last: bool
    refresh: bool = False


@dataclass(frozen=True)
class Publication:
    """What is to be packed as an image: a container, or its snapshot. `metadata` is the image's metadata.yaml.

    `compression` is `gzip`, `zstd`, `xz` or `none`; `force` packs a running container, too, as it is at one moment.
    """

    container: str
    snapshot: str | None
    metadata: bytes
    compression: str
    force: bool = False


class Driver(ABC):
    """Runs containers on one node."""

    name: str

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can do."""

    @abstractmethod
    async def open(self, listener: StateListener) -> None:
        """Make ready: pool, bridge, DHCP, id maps; sweep what a crash left; watch what runs already.

        Idempotent, and never touches a running container. From now on `listener` hears of every change that no
        command made, within 2 s: also of containers (of generation 0) that are made or removed by hand.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of watches and descriptors; containers, bridge and DHCP go on running."""

    @abstractmethod
    async def shut_down(self) -> None:
        """Stop all containers and what runs for them: DHCP, the managed bridge, mounts of the pool. The data stay.

        Called instead of `open`, not after it; what is not running is success.
        """

    @abstractmethod
    async def purge(self) -> None:
        """After `shut_down`: remove everything that this driver ever made on the host, containers and images too."""

    @abstractmethod
    async def facts(self) -> NodeFacts:
        """What the node is."""

    @abstractmethod
    async def containers(self) -> list[ContainerReport]:
        """All containers that exist on the node."""

    @abstractmethod
    async def inspect(self, container: str) -> ContainerReport:
        """One container. Raises NotFound."""

    @abstractmethod
    async def images(self) -> list[ImageReport]:
        """The images that are unpacked on the node."""

    @abstractmethod
    async def has_image(self, fingerprint: str, privileged: bool) -> bool:
        """Whether the image is unpacked for this kind of container."""

    @abstractmethod
    async def unpack_image(
        self, fingerprint: str, layout: str, file: Path, privileged: bool, report: ReportProgress, offset: int = 0
    ) -> None:
        """Unpack a verified image file; `layout` is `unified`, `rootfs`, or `split` (a bare root begins at `offset`).

        Nothing is visible until it is whole.
        """

    @abstractmethod
    async def drop_image(self, fingerprint: str) -> None:
        """Remove an image; containers made from it stay."""

    @abstractmethod
    async def create(self, spec: ContainerSpec, image: str | None) -> None:
        """Make a stopped container from an unpacked image, or with an empty root.

        The same id and generation present is success; another generation is Conflict. A disk limit that the storage
        cannot hold is Unsupported.
        """

    @abstractmethod
    async def copy(self, spec: ContainerSpec, source: str, snapshot: str | None, refresh: bool = False) -> None:
        """Make a container from another one here, or from its snapshot. It shares no id, lease or machine-id.

        `refresh`: it is there already, stopped, and gets the files of the source; its identity and limits stay.
        """

    @abstractmethod
    async def send(self, what: Outgoing, channel: Channel, report: ReportTransfer) -> None:
        """Send one round to a `receive` at the channel's other end; returns when that one has it all.

        Writes and reads until both ends have said `end`, and closes nothing. May be called again for the same round,
        and then sends what the other end does not have. Raises Conflict when the container must be stopped and runs,
        Unsupported when this format cannot carry it, Unavailable (as Restarted) as the channel does.
        """

    @abstractmethod
    async def receive(self, what: Incoming, channel: Channel) -> None:
        """Take one round from a `send` at the channel's other end. With `last` the container is there, stopped.

        What came in earlier rounds, or before a cut, stays until `end_transfer`. A container of this generation that
        is there already (and is not to be refreshed) is success. Raises InvalidRequest for data that must not be
        taken, NoSpace, Unavailable (as Restarted) as the channel does; then nothing but the transfer's part is left.
        """

    @abstractmethod
    async def end_transfer(self, transfer: str) -> None:
        """Remove what a transfer keeps on this node, at either end of it. Absent is success."""

    @abstractmethod
    def publish(self, what: Publication) -> AsyncIterator[bytes]:
        """An image in LXD's unified format. Neither the hostname nor a machine-id is in it, nor what is below /dev.

        Raises NotFound, Conflict (it runs, and no `force`), Unsupported (no program for the compression).
        """

    @abstractmethod
    async def delete(self, container: str, force: bool) -> None:
        """Remove it with its snapshots, lease and cgroups. Running without `force` is Conflict. Absent is success."""

    @abstractmethod
    async def start(self, container: str) -> None:
        """Start it. A frozen one is unfrozen. A failed start leaves nothing behind and says why."""

    @abstractmethod
    async def stop(self, container: str, timeout: float, force: bool) -> None:
        """Stop it: ask its init and wait `timeout` seconds (then DeadlinePassed, still running), or kill it."""

    @abstractmethod
    async def freeze(self, container: str) -> None:
        """Freeze it. Stopped is Conflict."""

    @abstractmethod
    async def unfreeze(self, container: str) -> None:
        """Let it go on. Stopped is Conflict."""

    @abstractmethod
    async def update(self, spec: ContainerSpec) -> None:
        """Write a new configuration; limits apply to the running container at once, or nothing is changed."""

    @abstractmethod
    async def rename(self, container: str, spec: ContainerSpec) -> None:
        """Give a stopped container `spec.id`, and the rest of `spec`. Running is Conflict when the id changes."""

    @abstractmethod
    async def adopt(self, spec: ContainerSpec, found: int) -> None:
        """Take a container that is there, of generation `found`, as `spec`; its files and snapshots stay.

        One of generation 0 (made by hand) must be stopped, and its files are given to the ids of `spec`. What it was
        before is kept for `settle_adoption`. Another generation is Conflict, an unknown id NotFound.
        """

    @abstractmethod
    async def settle_adoption(self, container: str, keep: bool) -> None:
        """Forget what an adopted container was before; without `keep` make it exactly that again."""

    @abstractmethod
    async def create_snapshot(self, container: str, snapshot: str) -> None:
        """Take a crash-consistent snapshot."""

    @abstractmethod
    async def delete_snapshot(self, container: str, snapshot: str) -> None:
        """Remove a snapshot. Absent is success."""

    @abstractmethod
    async def restore_snapshot(self, container: str, snapshot: str) -> None:
        """Put a stopped container's files back; its identity, address and limits stay."""

    @abstractmethod
    async def rename_snapshot(self, container: str, snapshot: str, new: str) -> None:
        """Call a snapshot `new`; done already is success. Another one of that name is Conflict, neither NotFound."""

    @abstractmethod
    def sample_node(self) -> NodeSample:
        """The node's load now. Quick: files only."""

    @abstractmethod
    def sample(self, containers: list[str] | None = None) -> list[ContainerSample]:
        """The figures of these containers, or of all, in one batch (stopped ones have disk figures only).

        Quick: files only, called in a thread. A container that is not there is left out.
        """
