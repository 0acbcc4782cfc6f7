"""What the agent knows of each container, in the container's own directory `<state>/lxc/<id>/`.

`vzfleet.json` is the record, `config` LXC's configuration. A directory without a record was made by hand.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.drivers.lxc import config
from agent.storage.volumes import finished, make_directory, sync_directory
from common.errors import Conflict, DriverFailed, NotFound
from common.names import CONTAINER_ID
from common.options import Settings, parse_config
from common.reports import ContainerSpec

log = logging.getLogger(__name__)
_STAGING = ".staging-"
RECORD = "vzfleet.json"


class Record(Struct, frozen=True, omit_defaults=True):
    """A container on this node. `cpus` are those that it was pinned to at its last start."""

    spec: ContainerSpec
    halt_signal: str = ""
    cpus: tuple[int, ...] = ()

    @property
    def settings(self) -> Settings:
        """Its configuration, parsed."""
        return parse_config(self.spec.config)


class Records:
    """The records of all containers, kept in memory too."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, Record] = {}

    async def open(self) -> None:
        """Read all records, and sweep what a crash left."""
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        make_directory(self.directory)
        for leftover in self.directory.glob(f"{_STAGING}*"):
            shutil.rmtree(leftover)
        self._known = {}
        for name in self.on_disk():
            record = self._read(name)
            if record is not None:
                self._known[name] = record

    def _read(self, name: str) -> Record | None:
        """The record in a directory; one that a crash kept from its new name gets it now."""
        try:
            record = msgspec.json.decode((self.directory / name / RECORD).read_bytes(), type=Record)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            log.error("a container's record is damaged", extra={"container": name, "error": str(error)})
            return None
        if record.spec.id == name:
            return record
        if CONTAINER_ID.fullmatch(record.spec.id) and not self.path(record.spec.id).exists():
            self.path(name).rename(self.path(record.spec.id))
            self._known[record.spec.id] = record
        return None

    def on_disk(self) -> set[str]:
        """The names of all directories that can be a container, ours or made by hand."""
        with os.scandir(self.directory) as entries:
            return {entry.name for entry in entries if CONTAINER_ID.fullmatch(entry.name) and entry.is_dir()}

    def all(self) -> dict[str, Record]:
        """All records by id."""
        return dict(self._known)

    def find(self, container: str) -> Record | None:
        """A container's record, None when there is none."""
        return self._known.get(container)

    def get(self, container: str) -> Record:
        """A container's record. Raises NotFound, also for one that was made by hand."""
        record = self._known.get(container)
        if record is not None:
            return record
        if (self.directory / container).exists():
            raise NotFound(f"container {container} is not managed by vzfleet")
        raise NotFound(f"container {container} is not on this node")

    def require_readable(self, container: str) -> None:
        """Raise DriverFailed when it is ours and its record is damaged: it may run, and nobody knows what it has."""
        file = self.path(container) / RECORD
        if container not in self._known and file.exists():
            raise DriverFailed(f"the record of container {container} is damaged: {file}")

    def path(self, container: str) -> Path:
        """The container's directory."""
        return self.directory / container

    async def create(self, record: Record, lines: config.Lines) -> None:
        """Make a container's directory, in one step and durably. Raises Conflict when there is one."""
        await finished(self._create, record, lines)
        self._known[record.spec.id] = record

    def _create(self, record: Record, lines: config.Lines) -> None:
        staging = self.directory / f"{_STAGING}{secrets.token_hex(8)}"
        staging.mkdir(mode=0o711)
        try:
            config.write(staging / "config", lines)
            _write(staging, record)
            # rename(2) would take the place of an empty directory.
            if self.path(record.spec.id).exists():
                raise Conflict(f"container {record.spec.id} exists already")
            staging.rename(self.path(record.spec.id))
        except BaseException:
            shutil.rmtree(staging)
            raise
        sync_directory(self.directory)

    async def save(self, record: Record, lines: config.Lines) -> None:
        """Write a changed record, then its configuration. Raises NotFound when its directory was removed by hand."""
        await finished(self._save, record, lines)
        self._known[record.spec.id] = record

    def _save(self, record: Record, lines: config.Lines) -> None:
        config.render(lines)
        if not self.path(record.spec.id).is_dir():
            raise NotFound(f"container {record.spec.id} is not on this node")
        if record != self._known.get(record.spec.id):
            _write(self.path(record.spec.id), record)
        config.write(self.path(record.spec.id) / "config", lines)

    async def rename(self, container: str, record: Record, lines: config.Lines) -> None:
        """Give a container's directory the id of `record`, with that record."""
        await finished(self._rename, container, record, lines)
        self._known.pop(container, None)
        self._known[record.spec.id] = record

    def _rename(self, container: str, record: Record, lines: config.Lines) -> None:
        source = self.path(container)
        config.write(source / "config", lines)
        # After a crash between these two `open` gives the directory the record's name.
        _write(source, record)
        source.rename(self.path(record.spec.id))
        sync_directory(self.directory)

    async def remove(self, container: str) -> None:
        """Remove a container's directory. Absent is success."""
        await finished(self._remove, container)
        self._known.pop(container, None)

    def _remove(self, container: str) -> None:
        staging = self.directory / f"{_STAGING}{secrets.token_hex(8)}"
        try:
            self.path(container).rename(staging)
        except FileNotFoundError:
            return
        sync_directory(self.directory)
        shutil.rmtree(staging)

    def forget(self, container: str) -> None:
        """Drop the record of a container whose directory was removed by hand."""
        self._known.pop(container, None)


def _write(directory: Path, record: Record) -> None:
    new = directory / f".{RECORD}.new"
    with new.open("wb") as handle:
        handle.write(msgspec.json.encode(record))
        handle.flush()
        os.fsync(handle.fileno())
    new.chmod(0o600)
    new.replace(directory / RECORD)
