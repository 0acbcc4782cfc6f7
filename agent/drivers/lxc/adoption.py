"""Taking containers into management that stand in the node's LXC path: our own from before, and those made by hand.

What a container was before is kept until the adoption is settled: of our own its record, beside the new one; of one
made by hand its whole directory, under a name that LXC and the agent do not take for a container.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import msgspec

from agent.drivers.lxc import archive, commands, config, rootfs
from agent.drivers.lxc.containers import Containers
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.ids import IdMap
from agent.drivers.lxc.records import RECORD, Record
from agent.drivers.lxc.update import Updater
from agent.storage.volumes import finished, remove_tree, sync_directory
from common.errors import Conflict, NotFound, Unsupported
from common.options import parse_config
from common.reports import ContainerSpec

log = logging.getLogger(__name__)
BEFORE = f"{RECORD}.before-adoption"
_ASIDE = ".before-adoption-"
_SUPPORTED = ("dir:", "btrfs:")


class Adoption:
    """Adopts containers, and gives them back."""

    def __init__(self, host: Host, containers: Containers, updater: Updater) -> None:
        self._host = host
        self._containers = containers
        self._updater = updater

    def sweep(self) -> None:
        """Give directories their names back that a crash kept from it. Called before anything else is looked at."""
        records = self._host.records
        for aside in sorted(records.directory.glob(f"{_ASIDE}*")):
            container = aside.name.removeprefix(_ASIDE)
            if not records.path(container).exists():
                aside.rename(records.path(container))

    async def adopt(self, spec: ContainerSpec, found: int) -> None:
        """As `Driver.adopt`."""
        record = self._host.records.find(spec.id)
        if record is not None and record.spec == spec:
            return
        if record is None:
            await self._adopt_foreign(spec, found)
            return
        if record.spec.generation != found:
            text = f"container {spec.id} here is of generation {record.spec.generation}, not {found}"
            raise Conflict(text, field="generation")
        before = self._host.records.path(spec.id) / BEFORE
        await finished(_write, before, msgspec.json.encode(record))
        await self._updater.update(spec)

    async def settle(self, container: str, keep: bool) -> None:
        """As `Driver.settle_adoption`."""
        before, aside = self._host.records.path(container) / BEFORE, self._aside(container)
        if before.exists():
            if not keep:
                await self._updater.update(msgspec.json.decode(before.read_bytes(), type=Record).spec)
            await finished(before.unlink)
        elif aside.exists():
            if keep:
                await finished(remove_tree, aside)
            else:
                await self._containers.delete(container)
                await finished(self._rename, aside, self._host.records.path(container))

    def _aside(self, container: str) -> Path:
        return self._host.records.directory / f"{_ASIDE}{container}"

    def _rename(self, old: Path, new: Path) -> None:
        old.rename(new)
        sync_directory(self._host.records.directory)

    # ------------------------------------------------------------ made by hand

    async def _adopt_foreign(self, spec: ContainerSpec, found: int) -> None:
        """Copy its files into our storage, for our ids; its directory stands aside then."""
        records = self._host.records
        directory = records.path(spec.id)
        if not (directory / "config").exists():
            raise NotFound(f"container {spec.id} is not on this node")
        records.require_readable(spec.id)
        if found != 0:
            raise Conflict(f"container {spec.id} here was made by hand", field="generation")
        if await commands.state(records.directory, spec.id) != "STOPPED":
            raise Conflict(f"container {spec.id} is running")
        definition = config.parse((directory / "config").read_text(encoding="utf-8", errors="replace"))
        root, ids = root_of(definition, directory), ids_of(definition)
        privileged = parse_config(spec.config).privileged
        self._containers.check(spec)
        staging = await self._containers.unpacked(archive.pack(root, ids, without_devices=True), privileged)
        record = Record(spec, await asyncio.to_thread(rootfs.halt_signal, staging / "rootfs"))
        await finished(self._rename, directory, self._aside(spec.id))
        try:
            await self._containers.admit(record, staging)
        except BaseException:
            if records.find(spec.id) is None:
                await finished(self._rename, self._aside(spec.id), directory)
            raise


def root_of(definition: config.Lines, directory: Path) -> Path:
    """Where the files of a container made by hand are. Raises Unsupported for what is no plain directory."""
    named = [value for key, value in definition if key in ("lxc.rootfs.path", "lxc.rootfs")]
    text = named[-1] if named else str(directory / "rootfs")
    for prefix in _SUPPORTED:
        text = text.removeprefix(prefix)
    root = Path(text)
    if not root.is_absolute() or not root.is_dir():
        raise Unsupported(f"the root file system {text[:200]!r} is no directory: take it into an image by hand")
    return root


def ids_of(definition: config.Lines) -> IdMap | None:
    """The ids by which its files are owned; None: those of the host. Raises Unsupported for maps of several parts."""
    maps = {value for key, value in definition if key in ("lxc.idmap", "lxc.id_map")}
    parts = sorted({tuple(value.split()[1:]) for value in maps})
    if not parts:
        return None
    if len(parts) != 1 or len(parts[0]) != 3 or parts[0][0] != "0" or not all(part.isdecimal() for part in parts[0]):
        raise Unsupported("its id map has several parts: take its files into an image by hand")
    return IdMap(int(parts[0][1]), int(parts[0][2]))


def _write(file: Path, content: bytes) -> None:
    new = file.with_name(f".{file.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    new.replace(file)
    sync_directory(file.parent)
