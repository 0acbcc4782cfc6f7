"""What an image file is: its layout, compression and properties, read without unpacking anything.

The file is hostile. Only GNU tar and the decompressors read it, in processes with bounds on memory and time, and
nothing is written: names are listed, metadata.yaml is printed.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from common.archives import COMPRESSIONS, MAX_ENTRIES, decompressed_limit
from common.errors import InvalidRequest, TooLarge, Unsupported
from controller.images.metadata import MAX_METADATA, read_metadata
from controller.images.tar import Reader

ALLOWED = (
    "a tar archive, plain or compressed with gz, xz, zst or bz2: "
    "LXD's unified format (metadata.yaml and rootfs/) or a bare root file system (bin, sbin, etc or usr at its top)"
)
TIMEOUT = 600.0
"""Seconds for reading the whole archive once; a larger one is an attack or beyond this host."""
MAX_NAME = 4096
MAX_METADATA_ARCHIVE = 16 * 2**20
"""Bytes of a split image's first archive: metadata.yaml and templates."""
ROOT_DIRECTORIES = frozenset({"bin", "sbin", "etc", "usr"})
_TAR_MAGIC = slice(257, 262)


@dataclass(frozen=True)
class ImageFacts:
    """An image file. `layout` is `unified`, `rootfs` or `split`; `compression` gz, xz, zst, bz2 or none.

    `properties` are those of metadata.yaml, all text; a bare root file system has none, and no architecture.
    """

    layout: str
    compression: str
    architecture: str | None
    created_at: datetime | None
    properties: dict[str, str]


async def inspect(path: Path, *, timeout: float = TIMEOUT) -> ImageFacts:
    """Read what an image file is.

    Raises InvalidRequest for what is no image, TooLarge for too many entries, DeadlinePassed after `timeout` seconds,
    Unsupported when this host has no program for its compression.
    """
    reader, compression = _reader(path, timeout)
    contents = await _survey(reader)
    if contents.metadata is None:
        if not contents.top & ROOT_DIRECTORIES:
            missing = "it has rootfs/ but no metadata.yaml" if contents.has_rootfs else "it has none at its top"
            raise _refused(f"the archive holds no root file system: {missing}")
        return ImageFacts("rootfs", compression, None, None, {})
    if not contents.has_rootfs:
        raise _refused("the archive has metadata.yaml but no rootfs/ directory")
    if not contents.inside & ROOT_DIRECTORIES:
        raise _refused("rootfs/ in the archive holds no root file system")
    text = await reader.print_member(contents.metadata, MAX_METADATA)
    facts = await asyncio.to_thread(read_metadata, text)
    return ImageFacts("unified", compression, facts.architecture, facts.created_at, facts.properties)


async def inspect_split(path: Path, offset: int, *, timeout: float = TIMEOUT) -> ImageFacts:
    """Read what a split image is: an archive with metadata.yaml, and from `offset` on that of the root file system.

    Raises what `inspect` raises.
    """
    if not 0 < offset < path.stat().st_size:
        raise _refused("one of the two parts of the image is empty")
    if offset > MAX_METADATA_ARCHIVE:
        raise TooLarge("the image's metadata is too large", field="file", allowed=f"at most {MAX_METADATA_ARCHIVE}")
    with tempfile.TemporaryFile() as head, path.open("rb") as file:
        await asyncio.to_thread(head.write, file.read(offset))
        head.flush()
        # A file without a name, which ends where the metadata's archive does.
        metadata, _ = _reader(Path(f"/proc/self/fd/{head.fileno()}"), timeout)
        name = (await _survey(metadata)).metadata
        if name is None:
            raise _refused("the metadata's archive has no metadata.yaml")
        text = await metadata.print_member(name, MAX_METADATA)
    root, compression = _reader(path, timeout, offset)
    if not (await _survey(root)).top & ROOT_DIRECTORIES:
        raise _refused("the second archive holds no root file system at its top")
    facts = await asyncio.to_thread(read_metadata, text)
    return ImageFacts("split", compression, facts.architecture, facts.created_at, facts.properties)


def _reader(path: Path, timeout: float, offset: int = 0) -> tuple[Reader, str]:
    """A reader of the archive that begins at `offset`, and its compression. Raises InvalidRequest, Unsupported."""
    with path.open("rb") as file:
        file.seek(offset)
        compression = _compression(file.read(512))
    program = COMPRESSIONS[compression][1] if compression != "none" else ()
    if program and shutil.which(program[0]) is None:
        raise Unsupported(f"the controller has no {program[0]} to read the image with: install it")
    limit = decompressed_limit(path.stat().st_size - offset)
    return Reader(path, program, timeout, limit, offset), compression


@dataclass
class _Contents:
    """What the archive's names tell: names at its top, directly in rootfs/, and how metadata.yaml is spelled."""

    top: set[str]
    inside: set[str]
    has_rootfs: bool = False
    metadata: str | None = None

    def add(self, name: str) -> None:
        """Take note of one member; a directory's name ends in a slash."""
        parts = name.strip("/").split("/")
        if ".." in parts:
            raise _refused(f"the archive has a member with '..' in its name: {name[:80]!r}")
        parts = [part for part in parts if part not in ("", ".")]
        if not parts:
            return
        directory = len(parts) > 1 or name.endswith("/")
        if parts[0] in ROOT_DIRECTORIES:
            self.top.add(parts[0])
        elif parts == ["metadata.yaml"] and not directory:
            self.metadata = self.metadata or name
        elif parts[0] == "rootfs":
            self._add_inside(parts, directory)

    def _add_inside(self, parts: list[str], directory: bool) -> None:
        if not directory:
            raise _refused("rootfs in the archive is not a directory")
        self.has_rootfs = True
        if len(parts) > 1 and parts[1] in ROOT_DIRECTORIES:
            self.inside.add(parts[1])


async def _survey(reader: Reader) -> _Contents:
    """Read the whole archive once: a damaged or endless one is found here, not on a node."""
    contents, entries = _Contents(set(), set()), 0
    async with aclosing(reader.names(MAX_NAME)) as names:
        async for name in names:
            entries += 1
            if entries > MAX_ENTRIES:
                raise TooLarge("the archive has too many members", allowed=f"at most {MAX_ENTRIES}")
            contents.add(name)
    return contents


def _compression(head: bytes) -> str:
    for name, (magic, _program) in COMPRESSIONS.items():
        if head.startswith(magic):
            return name
    if head[_TAR_MAGIC] == b"ustar":
        return "none"
    raise _refused("the file is no tar archive, or compressed in an unknown way")


def _refused(text: str) -> InvalidRequest:
    return InvalidRequest(text, field="file", allowed=ALLOWED)
