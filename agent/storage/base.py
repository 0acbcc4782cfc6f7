"""What a driver asks of a place where file systems live.

A volume is a directory tree with a name: `images/<fingerprint>-<kind>`, `containers/<id>`,
`snapshots/<id>/<name>`, `transfers/<id>`; `kind` is `mapped` or `privileged`. The container's root is
`<volume>/rootfs`. What a transfer keeps are volumes inside its own one, and go with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path


class Storage(ABC):
    """Keeps volumes. All changes are idempotent and atomic: a volume is whole or absent."""

    name: str
    disk_limits: bool
    instant: bool
    """Whether `clone` sees one moment of its source; otherwise the source must not change meanwhile."""
    root: Path

    @abstractmethod
    async def open(self) -> None:
        """Make the pool ready (mount it, make it on the first run), sweep what a crash left."""

    @abstractmethod
    async def shut_down(self) -> None:
        """Let go of the host: no mount or loop device is left. The data stay, and `open` brings them back."""

    @abstractmethod
    async def purge(self) -> None:
        """After `shut_down`: remove all volumes and what holds them."""

    @abstractmethod
    def path(self, volume: str) -> Path:
        """Where a volume is, whether it exists or not."""

    @abstractmethod
    async def create(self) -> Path:
        """Make an empty staging volume; `commit` gives it its name, `discard` removes it."""

    @abstractmethod
    async def commit(self, staging: Path, volume: str) -> None:
        """Give a staging volume its name, in one step and durably; a volume that has it already is replaced."""

    @abstractmethod
    async def discard(self, staging: Path) -> None:
        """Remove a staging volume."""

    @abstractmethod
    async def clone(self, source: str) -> Path:
        """A staging volume with the content of another one (crash-consistent), without its limit."""

    @abstractmethod
    async def snapshot(self, source: str, volume: str) -> None:
        """Make `volume` a read-only snapshot of another one, for `btrfs send`. There already is success.

        Raises Unsupported where there is no such thing, and for a source with subvolumes inside: they would be missing.
        """

    @abstractmethod
    async def delete(self, volume: str) -> None:
        """Remove a volume with all that was made inside it. Absent is success."""

    @abstractmethod
    async def rename(self, volume: str, new: str) -> None:
        """Move a volume."""

    @abstractmethod
    async def set_limit(self, volume: str, size: int | None) -> None:
        """Limit it to `size` bytes, or take the limit away. Raises Unsupported where it cannot be held."""

    @abstractmethod
    async def limit_staging(self, staging: Path, size: int | None) -> None:
        """The same for a staging volume. Where limits cannot be held, nothing happens."""

    @abstractmethod
    def usage(self, volume: str) -> tuple[int | None, int | None]:
        """(bytes used, limit in bytes) as far as known: from files only, quick."""

    @abstractmethod
    def pool(self) -> tuple[int, int]:
        """(size, free) of the pool in bytes."""

    @abstractmethod
    def volumes(self, kind: str) -> list[str]:
        """The names below `images`, `containers`, `snapshots/<id>`, or a transfer's volume."""
