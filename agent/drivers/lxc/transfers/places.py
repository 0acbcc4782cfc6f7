"""Where a transfer keeps what its rounds need of each other, in the storage of each node.

`transfers/<id>/sent/` at the sender and `transfers/<id>/data/` at the receiver; there `snap-<name>` is a snapshot's
volume and `round-<n>` (`tree` in the files format) the container's. Beside `data`, out of reach of what comes in, a
file `<volume>.whole` says which volume of that name is there and was checked: what comes in may rename volumes.
"""

from __future__ import annotations

import os
from pathlib import Path

from agent.storage import Storage, btrfs_ioctl
from agent.storage.volumes import PASSABLE, finished, sync_directory
from common.errors import InvalidRequest
from common.names import TRANSFER, TRANSFER_RULE

TREE = "tree"
_PRIVATE = 0o700


def transfer_volume(transfer: str) -> str:
    """A transfer's volume. Raises InvalidRequest for an id that may not be part of a path."""
    if not TRANSFER.fullmatch(transfer):
        raise InvalidRequest("unusable id of a transfer", field="transfer", allowed=TRANSFER_RULE)
    return f"transfers/{transfer}"


def snapshot_name(snapshot: str) -> str:
    """The volume of a snapshot in a transfer."""
    return f"snap-{snapshot}"


def round_name(number: int) -> str:
    """The volume of a round in a transfer of the btrfs format."""
    return f"round-{number}"


class Place:
    """One end's part of a transfer: `side` is `sent` or `data`.

    `private`: nobody but the host's root passes through, since a stream may leave files of that root with a setuid bit.
    """

    def __init__(self, storage: Storage, transfer: str, side: str, *, private: bool) -> None:
        self._storage = storage
        self._mode = _PRIVATE if private else PASSABLE
        self.transfer = transfer_volume(transfer)
        self.volume = f"{self.transfer}/{side}"

    async def open(self) -> None:
        """Make it unless it is there."""
        for volume in (self.transfer, self.volume):
            if not self._storage.path(volume).is_dir():
                await self._storage.commit(await self._storage.create(), volume)
            if volume == self.transfer:
                self._storage.path(volume).chmod(self._mode)

    def begun(self) -> float:
        """When this was asked first, in seconds since 1970 by the file system's clock."""
        mark = self._storage.path(self.transfer) / "begun"
        if not mark.exists():
            mark.touch()
        return mark.stat().st_mtime

    @property
    def path(self) -> Path:
        """Its directory."""
        return self._storage.path(self.volume)

    def inner(self, name: str) -> str:
        """A volume in it."""
        return f"{self.volume}/{name}"

    def names(self) -> set[str]:
        """The volumes in it, whole or not."""
        return {Path(volume).name for volume in self._storage.volumes(self.volume)}

    def whole(self) -> set[str]:
        """The volumes in it that were marked whole."""
        return {name for name in self.names() if self._marked(name) == self._identity(name)}

    async def keep_only(self, names: set[str]) -> bool:
        """Whether nothing else has come in; if something has, all goes."""
        if {path.name for path in self.path.iterdir()} <= names:
            return True
        await self._storage.delete(self.volume)
        await self.open()
        return False

    async def set_whole(self, name: str) -> None:
        """Mark a volume whole, durably."""
        await finished(self._set_whole, name)

    def _set_whole(self, name: str) -> None:
        mark = self._mark(name)
        mark.write_text(self._identity(name), encoding="ascii")
        os.utime(mark.parent)  # an old transfer that nobody ended is swept by its time
        sync_directory(mark.parent)

    async def drop(self, name: str) -> None:
        """Remove a volume, and its mark before."""
        self._mark(name).unlink(missing_ok=True)
        await self._storage.discard(self._storage.path(self.inner(name)))

    def _identity(self, name: str) -> str:
        """Tells a subvolume from any other that gets its name."""
        path = self._storage.path(self.inner(name))
        return str(btrfs_ioctl.subvolume_id(path)) if self._storage.name == "btrfs" else ""

    def _marked(self, name: str) -> str | None:
        try:
            return self._mark(name).read_text(encoding="ascii")
        except FileNotFoundError:
            return None

    def _mark(self, name: str) -> Path:
        return self._storage.path(self.transfer) / f"{name}.whole"
