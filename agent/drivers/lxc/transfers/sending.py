"""The sender's part of a round: take what is to be sent, ask what the other end has, send the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from agent.channel.base import Channel
from agent.drivers.base import Outgoing, ReportTransfer
from agent.drivers.lxc import archive
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.ids import IdMap
from agent.drivers.lxc.snapshots import Snapshots
from agent.drivers.lxc.transfers import btrfs, rsync
from agent.drivers.lxc.transfers.frames import VERSION, Answer, Frames, Next, Opening, Taken, Volume
from agent.drivers.lxc.transfers.places import TREE, Place, round_name, snapshot_name
from agent.storage.volumes import sync_files

Still = Callable[[str, str | None], AbstractAsyncContextManager[None]]
"""Holds a container's processes while its files are read one by one, where that is needed."""


@dataclass(frozen=True)
class _Source:
    """A volume to be sent, and where its files are."""

    volume: Volume
    origin: str


class Sender:
    """Sends containers of a node, one round a call."""

    def __init__(self, host: Host, snapshots: Snapshots, still: Still) -> None:
        self._host = host
        self._snapshots = snapshots
        self._still = still

    async def send(self, what: Outgoing, running: bool, channel: Channel, report: ReportTransfer) -> None:
        """See `Driver.send`; that the container is not `running` when it must not is the caller's to check."""
        ids = self._host.id_map(self._host.records.get(what.container).settings.privileged)
        if what.format == "files":
            rsync.require()
        place = Place(self._host.storage, what.transfer, "sent", private=what.format == "btrfs")
        await place.open()
        sources = await self._taken(what, running, place)
        frames = Frames(channel)
        volumes = tuple(source.volume for source in sources)
        await frames.tell(Opening(VERSION, what.format, what.round, what.moving, volumes))
        answer = await frames.hear(Answer)
        if not answer.done:
            progress = _Progress(report, self._size(sources, answer))
            for number, source in enumerate(sources):
                if source.volume.name not in answer.whole:
                    before = [earlier.volume.name for earlier in sources[:number]]
                    await self._send_one(what, source, before, answer, place, frames, progress, ids)
        await frames.hear(Taken)
        await frames.finish(first=False)

    async def _taken(self, what: Outgoing, running: bool, place: Place) -> list[_Source]:
        """The volumes of this round in their order, the root last; for btrfs, read-only snapshots of them."""
        sources = []
        if what.with_snapshots and what.snapshot is None:
            for one in self._snapshots.all(what.container):
                volume = Volume(snapshot_name(one.name), one.name, one.created_at)
                sources.append(_Source(volume, self._snapshots.volume(what.container, one.name)))
        self._host.require_files(what.container)
        name = round_name(what.round) if what.format == "btrfs" else TREE
        root = f"containers/{what.container}"
        origin = root if what.snapshot is None else self._snapshots.volume(what.container, what.snapshot)
        sources.append(_Source(Volume(name), origin))
        if what.format == "btrfs":
            return [await self._frozen(source, place) for source in sources]
        # What a container does while its files are copied one by one is not in the copy.
        if running and not what.moving and what.snapshot is None and self._host.storage.instant:
            sources[-1] = await self._frozen(sources[-1], place)
        return sources

    async def _frozen(self, source: _Source, place: Place) -> _Source:
        frozen = place.inner(source.volume.name)
        await self._host.storage.snapshot(source.origin, frozen)
        return _Source(source.volume, frozen)

    def _size(self, sources: list[_Source], answer: Answer) -> int | None:
        """The bytes of a single volume that is sent in full, None when it is not known how many there will be."""
        missing = [source for source in sources if source.volume.name not in answer.whole]
        if len(missing) != 1 or answer.whole:
            return None
        return self._host.storage.usage(missing[0].origin)[0]

    async def _send_one(
        self,
        what: Outgoing,
        source: _Source,
        before: list[str],
        answer: Answer,
        place: Place,
        frames: Frames,
        progress: _Progress,
        ids: IdMap | None,
    ) -> None:
        snapshot = source.volume.snapshot
        progress.stage = f"snapshot {snapshot}" if snapshot is not None else "files"
        if what.format == "files":
            live = snapshot is None and what.snapshot is None
            early = live and what.moving and not what.last
            root = self._host.storage.path(source.origin) / "rootfs"
            since = place.begun() if live and what.moving else None
            if early:
                # Only the first store into a mapped page after this gives its file a new time (mmap(2)).
                await sync_files(root)
            await frames.tell(Next(source.volume.name, changing_since=since if what.last else None))
            guard = self._still(what.container, None) if live and not what.moving else contextlib.nullcontext()
            async with guard:
                await rsync.send(root, ids or archive.EVERY_ID, frames, progress.add, changing=early)
            return
        parent = _parent(source.volume.name, before, set(answer.whole) & place.names())
        await frames.tell(Next(source.volume.name, parent))
        base = self._host.storage.path(place.inner(parent)) if parent is not None else None
        stream = btrfs.send(self._host.storage.path(source.origin), base)
        async with contextlib.aclosing(stream):
            async for piece in stream:
                await frames.write(piece)
                progress.add(len(piece))
        await frames.end_volume()


class _Progress:
    """Counts the bytes of a round."""

    def __init__(self, report: ReportTransfer, total: int | None) -> None:
        self.stage = "files"
        self._report = report
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        """So many bytes more were sent."""
        self._done += count
        total = max(self._total, self._done) if self._total is not None else None
        self._report(self.stage, self._done, total)


def _parent(name: str, before: list[str], both: set[str]) -> str | None:
    """What a volume is sent as a difference from: an earlier round, the latest, or else the snapshot before it."""
    if name.startswith("round-"):
        for number in range(int(name.removeprefix("round-")) - 1, -1, -1):
            if round_name(number) in both:
                return round_name(number)
    return before[-1] if before else None
