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

from common.reports import ContainerReport, ContainerSample, ContainerSpec, ImageReport, NodeFacts, NodeSample

ReportProgress = Callable[[str, int | None], None]
"""Called with a stage ("unpacking") and a percentage, or None where that is not known."""

StateListener = Callable[[ContainerReport, bool], None]
"""Called when a container changed by itself; the second argument says that it is gone."""


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do beyond the methods below."""

    disk_limits: bool
    snapshots: bool
    privileged: bool


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
        self, fingerprint: str, layout: str, file: Path, privileged: bool, report: ReportProgress
    ) -> None:
        """Unpack a verified image file; `layout` is `unified` or `rootfs`. Nothing is visible until it is whole."""

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
    async def copy(self, spec: ContainerSpec, source: str, snapshot: str | None) -> None:
        """Make a container from another one here, or from its snapshot. It shares no id, lease or machine-id."""

    @abstractmethod
    def send(self, container: str, snapshot: str | None, with_snapshots: bool) -> AsyncIterator[bytes]:
        """A stopped container's (or a snapshot's) files as a stream which `receive` of any storage understands."""

    @abstractmethod
    async def receive(self, spec: ContainerSpec, stream: AsyncIterator[bytes]) -> None:
        """Make a container from what `send` gave. Nothing is visible until the stream has ended well."""

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
    def sample_node(self) -> NodeSample:
        """The node's load now. Quick: files only."""

    @abstractmethod
    def sample(self, containers: list[str] | None = None) -> list[ContainerSample]:
        """The figures of these containers, or of all, in one batch (stopped ones have disk figures only).

        Quick: files only, called in a thread. A container that is not there is left out.
        """
