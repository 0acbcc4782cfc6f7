"""Trees of files to and from tar archives, by GNU tar in the sandbox (tar's manual; `sandbox.py`)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agent.drivers.lxc.ids import IdMap
from common.errors import DriverFailed, InvalidRequest, NoSpace, TooLarge
from common.process import end

CHUNK = 256 * 1024
EVERY_ID = IdMap(0, 2**32 - 1)
"""The map of a privileged image: all ids as they are, but without power over the host."""
_SANDBOX = Path(__file__).with_name("sandbox.py")
_EXACT = ("--numeric-owner", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability", "--acls")
_CREATE = ("tar", "--create", "--format=posix", "--pax-option=delete=atime,delete=ctime", "--sparse", *_EXACT)
_EXTRACT = ("tar", "--extract", "--preserve-permissions", "--same-owner", *_EXACT)
_UNLIMITED = 2**62
_MAGIC = ((b"\x1f\x8b", "--gzip"), (b"\xfd7zXZ\0", "--xz"), (b"\x28\xb5\x2f\xfd", "--zstd"), (b"BZh", "--bzip2"))
# LXC makes /dev anew at every start, and nodes in it could not be made here.
_DEVICES = tuple(f"--exclude={start}dev/*" for start in ("", "./", "rootfs/", "./rootfs/"))


@dataclass(frozen=True)
class Bounds:
    """What an archive may grow to: files and directories, and bytes of one file (holes count)."""

    entries: int
    file_size: int


@asynccontextmanager
async def _sandboxed(
    ids: IdMap | None, directory: Path, mode: str, largest: int, program: Sequence[str], **pipes: object
) -> AsyncIterator[asyncio.subprocess.Process]:
    mapping = (str(ids.first), str(ids.count)) if ids is not None else ("-1", "0")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(_SANDBOX), *mapping, str(directory), mode, str(largest), *program),
        start_new_session=True,
        **pipes,  # type: ignore[arg-type]
    )
    try:
        yield process
    finally:
        await end(process)


async def pack(directory: Path, ids: IdMap | None, *, without_devices: bool = False) -> AsyncGenerator[bytes, None]:
    """The content of a directory as a tar archive; sockets are left out. Raises DriverFailed.

    `without_devices` leaves out what is below /dev, too: for roots that others made, which may have nodes there.
    """
    pipes = {"stdin": asyncio.subprocess.DEVNULL, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    left_out = ("--anchored", "--exclude=./dev/*") if without_devices else ()
    program = (*_CREATE, *left_out, "--file=-", ".")
    async with _sandboxed(ids, directory, "ro", _UNLIMITED, program, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None  # noqa: S101 -- pipes, as asked for
        errors = asyncio.ensure_future(_tail(process.stderr))
        try:
            while data := await process.stdout.read(CHUNK):
                yield data
            _check(await process.wait(), await errors)
        finally:
            errors.cancel()


async def unpack_stream(directory: Path, ids: IdMap | None, stream: AsyncIterator[bytes]) -> None:
    """Unpack what `pack` gave. Raises DriverFailed, NoSpace."""
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.PIPE}
    async with _sandboxed(ids, directory, "rw", _UNLIMITED, (*_EXTRACT, "--file=-"), **pipes) as process:
        assert process.stdin is not None and process.stderr is not None  # noqa: S101 -- pipes, as asked for
        errors = asyncio.ensure_future(_tail(process.stderr))
        try:
            try:
                async for data in stream:
                    process.stdin.write(data)
                    await process.stdin.drain()
                process.stdin.close()
            except (BrokenPipeError, ConnectionResetError):
                pass  # tar has ended early, and says why below
            _check(await process.wait(), await errors)
        finally:
            errors.cancel()


async def unpack_image(directory: Path, ids: IdMap, archive: BinaryIO, bounds: Bounds) -> None:
    """Unpack an image's archive, compressed or not; nothing below /dev is taken.

    Raises InvalidRequest for an archive that tar refuses, TooLarge beyond the bounds, NoSpace.
    """
    magic = os.pread(archive.fileno(), 8, 0)
    compression = [option for start, option in _MAGIC if magic.startswith(start)]
    program = (*_EXTRACT, *compression, "--anchored", *_DEVICES, "--verbose", "--file=-")
    pipes = {"stdin": archive, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    async with _sandboxed(ids, directory, "rw", bounds.file_size, program, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None  # noqa: S101 -- pipes, as asked for
        errors = asyncio.ensure_future(_tail(process.stderr))
        try:
            left = bounds.entries
            # A name a line; a line break in a name is written as \n.
            while names := await process.stdout.read(CHUNK):
                left -= names.count(b"\n")
                if left < 0:
                    raise TooLarge(f"the image has more than {bounds.entries} files")
            _check(await process.wait(), await errors, InvalidRequest)
        finally:
            errors.cancel()


async def _tail(stream: asyncio.StreamReader) -> str:
    """The end of what a program prints, read as it comes."""
    kept = b""
    while data := await stream.read(65536):
        kept = (kept + data)[-2000:]
    return kept.decode(errors="replace")


def _check(code: int, errors: str, kind: type[DriverFailed] | type[InvalidRequest] = DriverFailed) -> None:
    if code == 0:
        return
    lines = [line for line in errors.splitlines() if line.strip()]
    text = "".join(mark if mark.isprintable() else "?" for mark in "; ".join(lines[-3:]))[:500]
    if "No space left" in text or "quota exceeded" in text.lower():
        raise NoSpace(f"there is no room for the files: {text}")
    if "File size limit" in text or "File too large" in text:
        raise TooLarge(f"a file is too large: {text}")
    raise kind(f"the archive cannot be worked on (code {code}): {text or 'tar printed nothing'}")
