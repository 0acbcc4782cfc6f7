"""The receiver's part of a round: say what is there, take the rest, and with the last round make the container.

What comes may be hostile: it is written by programs in the sandbox, below the transfer's own directory, and checked
before it becomes a container.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from pathlib import Path

from agent.channel.base import Channel
from agent.drivers.base import Incoming
from agent.drivers.lxc import archive, rootfs
from agent.drivers.lxc.containers import Containers, volume
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.records import Record
from agent.drivers.lxc.snapshots import Snapshots
from agent.drivers.lxc.transfers import btrfs, rsync
from agent.drivers.lxc.transfers.frames import (
    MAX_SNAPSHOTS,
    VERSION,
    Answer,
    Frames,
    Next,
    Opening,
    Taken,
    Volume,
)
from agent.drivers.lxc.transfers.guard import Guard
from agent.drivers.lxc.transfers.places import TREE, Place, round_name, snapshot_name
from agent.drivers.lxc.transfers.room import bound, within_room
from agent.storage import btrfs_ioctl
from agent.storage.volumes import PASSABLE, remove_tree, sync_files
from common.errors import InvalidRequest, Unsupported
from common.names import check_snapshot_name
from common.options import parse_config


class Receiver:
    """Receives containers on a node, one round a call."""

    def __init__(self, host: Host, containers: Containers, snapshots: Snapshots) -> None:
        self._host = host
        self._containers = containers
        self._snapshots = snapshots

    async def receive(self, what: Incoming, channel: Channel) -> None:
        """See `Driver.receive`; that a container to be refreshed does not run is the caller's to check."""
        self._containers.check(what.spec)
        if what.format == "files":
            rsync.require()
        elif self._host.storage.name != "btrfs":
            raise Unsupported("this node's storage is not btrfs", field="format", allowed="files")
        frames = Frames(channel)
        opening = await frames.hear(Opening)
        _check_opening(opening, what)
        present = self._containers.present(what.spec)
        if what.refresh:
            self._host.records.get(what.spec.id)
        elif present:
            await frames.tell(Answer(done=True))
            await _agree(frames)
            return
        round = _Round(self._host, what, opening)
        await round.open()
        there = {one.name for one in self._snapshots.all(what.spec.id)} if what.refresh else set()
        kept = {one.name for one in opening.volumes if one.snapshot in there}
        whole = round.whole() | kept
        await frames.tell(Answer(tuple(sorted(whole))))
        for one in opening.volumes:
            if one.name not in whole:
                await round.take(one, frames)
        if what.last:
            await self._make(what, opening, round, kept)
        await _agree(frames)

    async def _make(self, what: Incoming, opening: Opening, round: _Round, kept: set[str]) -> None:
        """Make the container of what has come, or (to be refreshed) give it that. When it fails, nothing is left."""
        container = what.spec.id
        made: list[str] = []
        try:
            for one in opening.volumes:
                if one.snapshot is not None and one.name not in kept:
                    staging = await round.staging(one)
                    made.append(one.snapshot)
                    await self._snapshots.admit(container, one.snapshot, one.created_at, staging)
            staging = await round.staging(opening.volumes[-1])
            if what.refresh:
                await self._containers.replace(self._host.records.get(container), staging)
            else:
                record = Record(what.spec, await asyncio.to_thread(rootfs.halt_signal, staging / "rootfs"))
                await self._containers.admit_whole(record, staging, moved=opening.moving)
        except BaseException:
            if what.refresh or self._host.records.find(container) is None:
                for snapshot in made:
                    await self._snapshots.delete(container, snapshot)
            raise


class _Round:
    """What one round brings, in the transfer's own place."""

    def __init__(self, host: Host, what: Incoming, opening: Opening) -> None:
        settings = parse_config(what.spec.config)
        self._storage = host.storage
        self._what = what
        self._opening = opening
        self._disk = settings.disk
        self._owner = host.owner(settings.privileged)
        self._ids = host.id_map(settings.privileged)
        self._place = Place(host.storage, what.transfer, "data", private=what.format == "btrfs")

    async def open(self) -> None:
        """Make ready."""
        await self._place.open()

    def whole(self) -> set[str]:
        """The volumes that are there whole, of this round and of earlier ones."""
        return self._place.whole()

    async def take(self, one: Volume, frames: Frames) -> None:
        """Take the volume which the sender sends next, and which is to be this one."""
        following = await frames.hear(Next)
        if following.volume != one.name:
            raise InvalidRequest("the other end sends another volume than was agreed")
        if self._what.format == "files":
            await self._take_files(one, following.changing_since, frames)
        else:
            await self._take_stream(one, following.parent, frames)

    async def _take_stream(self, one: Volume, parent: str | None, frames: Frames) -> None:
        uuids = await asyncio.to_thread(self._uuids)
        if parent is not None and parent not in uuids:
            raise InvalidRequest("the volume is based on one that is not here")
        base = uuids[parent] if parent is not None else None
        guard = Guard(one.name, self._ids, base, frozenset(uuids.values()))
        shared = self._storage.usage(self._place.inner(parent))[0] if parent is not None else 0
        limit = bound(self._storage, self._disk, shared or 0)
        await self._place.drop(one.name)
        known = self._place.names()
        try:
            async with contextlib.aclosing(frames.volume()) as pieces:
                await within_room(self._storage, btrfs.receive(self._place.path, pieces, guard, limit))
            # Links in the volume may have led beside it.
            if not await self._place.keep_only(known | {one.name}):
                raise InvalidRequest("the btrfs stream is not taken: it writes beside its volume")
        except BaseException:
            await self._place.keep_only(known | {one.name})
            await self._place.drop(one.name)
            raise
        await self._place.set_whole(one.name)

    def _uuids(self) -> dict[str, bytes]:
        """The volumes that are there whole, and as what they were received."""
        return {name: btrfs_ioctl.subvolume_info(self._place.path / name).received_uuid for name in self._place.whole()}

    async def _take_files(self, one: Volume, changing_since: float | None, frames: Frames) -> None:
        tree = self._storage.path(self._place.inner(one.name))
        if not tree.is_dir():
            await self._begin(one)
        used = self._storage.usage(self._place.inner(one.name))[0] or 0
        await self._storage.limit_staging(tree, bound(self._storage, self._disk, used))
        early = one.snapshot is None and self._opening.moving and not self._what.last
        ids = self._ids or archive.EVERY_ID
        if changing_since is not None:
            await rsync.doubt(tree / "rootfs", ids, changing_since)
        await within_room(self._storage, rsync.receive(tree / "rootfs", ids, frames, changing=early))
        await sync_files(tree)
        if one.snapshot is not None:
            await self._place.set_whole(one.name)

    async def _begin(self, one: Volume) -> None:
        """Begin a tree with what is most like it: the snapshot before it, or the container that is to be refreshed."""
        order = [volume.name for volume in self._opening.volumes]
        earlier = [name for name in order[: order.index(one.name)] if name in self._place.names()]
        if earlier:
            staging = await self._storage.clone(self._place.inner(earlier[-1]))
        elif self._what.refresh:
            staging = await self._storage.clone(volume(self._what.spec.id))
        else:
            staging = await self._storage.create()
            (staging / "rootfs").mkdir(mode=0o755)
            os.chown(staging / "rootfs", self._owner, self._owner)
        await self._storage.commit(staging, self._place.inner(one.name))

    async def staging(self, one: Volume) -> Path:
        """A staging volume with what has come, and nothing beside the root."""
        name = self._place.inner(one.name)
        staging = await self._storage.clone(name) if self._storage.instant else self._storage.path(name)
        try:
            await asyncio.to_thread(_clear, staging)
        except BaseException:
            await self._storage.discard(staging)
            raise
        return staging


async def _agree(frames: Frames) -> None:
    await frames.tell(Taken())
    await frames.finish(first=True)


def _check_opening(opening: Opening, what: Incoming) -> None:
    """Raise InvalidRequest when the sender means another round, or volumes that there cannot be."""
    if (opening.version, opening.format, opening.round) != (VERSION, what.format, what.round):
        raise InvalidRequest("the other end sends another round, format or version than was agreed")
    *snapshots, root = opening.volumes or (Volume(""),)
    if len(snapshots) > MAX_SNAPSHOTS:
        raise InvalidRequest("there are too many snapshots", allowed=f"at most {MAX_SNAPSHOTS}")
    for one in snapshots:
        check_snapshot_name(one.snapshot or "")
        if one.name != snapshot_name(one.snapshot or ""):
            raise InvalidRequest("a snapshot's volume has another name than the snapshot")
    if root != Volume(round_name(what.round) if what.format == "btrfs" else TREE):
        raise InvalidRequest("the container itself is not among what comes")
    if len({one.name for one in snapshots}) != len(snapshots):
        raise InvalidRequest("a snapshot comes twice")


def _clear(staging: Path) -> None:
    """Remove all beside the root, and make the volume ours. Follows no link."""
    os.chown(staging, 0, 0)
    staging.chmod(PASSABLE)
    with os.scandir(staging) as entries:
        beside = [entry for entry in entries if entry.name != "rootfs"]
    for entry in beside:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(Path(entry.path))
        else:
            Path(entry.path).unlink()
    try:
        mode = (staging / "rootfs").lstat().st_mode
    except FileNotFoundError:
        mode = 0
    if not stat.S_ISDIR(mode):
        raise InvalidRequest("the container has no root directory")
