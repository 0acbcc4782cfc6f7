"""Trees of files to and from tar archives, by GNU tar in the sandbox (tar's manual; `sandbox.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agent.drivers.lxc.ids import IdMap
from common.archives import COMPRESSIONS, bomb_guard, explained
from common.errors import DriverFailed, InvalidRequest, NoSpace, TooLarge, Unsupported
from common.process import end

CHUNK = 256 * 1024
EVERY_ID = IdMap(0, 2**32 - 1)
"""The map of a privileged image: all ids as they are, but without power over the host."""
_SANDBOX = Path(__file__).with_name("sandbox.py")
_EXACT = ("--numeric-owner", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability", "--acls")
_CREATE = ("tar", "--create", "--format=posix", "--pax-option=delete=atime,delete=ctime", "--sparse", *_EXACT)
_EXTRACT = ("tar", "--extract", "--preserve-permissions", "--same-owner", *_EXACT)
_UNLIMITED = 2**62
COMPRESSORS = {
    "none": ("cat",),
    "gzip": ("gzip", "--no-name"),
    "zstd": ("zstd", "--quiet", "-"),
    "xz": ("xz", "--threads=1"),
}
"""The program for each name of a compression, from its standard input to its standard output."""
# LXC makes /dev anew at every start, and nodes in it could not be made here.
_DEVICES = tuple(f"--exclude={start}dev/*" for start in ("", "./", "rootfs/", "./rootfs/"))


@dataclass(frozen=True)
class Bounds:
    """What an archive may grow to: files and directories, bytes of one file (holes count), bytes once decompressed."""

    entries: int
    file_size: int
    decompressed: int


@asynccontextmanager
async def sandboxed(
    ids: IdMap | None, directory: Path, mode: str, largest: int, program: Sequence[str], **pipes: object
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program in the sandbox, where `directory` is `/data`, writable when `mode` is `rw`; killed at the end.

    It has the ids of `ids`, or (None) is the host's root; `largest` is the greatest size of a file in bytes.
    """
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
    async with sandboxed(ids, directory, "ro", _UNLIMITED, program, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None  # noqa: S101 -- pipes, as asked for
        errors = asyncio.ensure_future(tail(process.stderr))
        try:
            while data := await process.stdout.read(CHUNK):
                yield data
            _check(await process.wait(), await errors)
        finally:
            errors.cancel()


async def pack_image(
    volume: Path, ids: IdMap | None, head: bytes, compression: str, left_out: Sequence[str]
) -> AsyncGenerator[bytes, None]:
    """`rootfs` in a volume as a tar archive that begins with the members in `head`, squeezed by a second program.

    Neither the members `left_out` nor what is below /dev are in it. Raises Unsupported, DriverFailed.
    """
    squeeze = COMPRESSORS[compression]
    if shutil.which(squeeze[0]) is None:
        raise Unsupported(f"this node has no {squeeze[0]}: install it", field="compression_algorithm")
    excluded = ("--anchored", "--exclude=rootfs/dev/*", *(f"--exclude={path}" for path in left_out))
    program = (*_CREATE, *excluded, "--file=-", "rootfs")
    outputs: dict[str, object] = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    near, far = os.pipe()
    with os.fdopen(near, "rb") as source, os.fdopen(far, "wb") as sink:
        squeezer = sandboxed(EVERY_ID, volume, "ro", _UNLIMITED, squeeze, stdin=source, **outputs)
        async with squeezer as squeezing:
            source.close()
            await asyncio.to_thread(_write_all, sink, head)
            outputs |= {"stdin": asyncio.subprocess.DEVNULL, "stdout": sink}
            async with sandboxed(ids, volume, "ro", _UNLIMITED, program, **outputs) as packing:
                sink.close()
                async for piece in _drained(squeezing, packing):
                    yield piece


def _write_all(sink: BinaryIO, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # who reads it has ended early, and says why
        sink.write(content)
        sink.flush()


async def _drained(last: asyncio.subprocess.Process, first: asyncio.subprocess.Process) -> AsyncGenerator[bytes, None]:
    """What the last of two programs in a row prints, until both have ended well."""
    assert last.stdout is not None and last.stderr is not None and first.stderr is not None  # noqa: S101 -- pipes
    errors = [asyncio.ensure_future(tail(stream)) for stream in (first.stderr, last.stderr)]
    try:
        while data := await last.stdout.read(CHUNK):
            yield data
        for process, said in zip((first, last), errors, strict=True):
            _check(await process.wait(), await said)
    finally:
        for each in errors:
            each.cancel()


async def unpack_stream(directory: Path, ids: IdMap | None, stream: AsyncIterator[bytes]) -> None:
    """Unpack what `pack` gave. Raises DriverFailed, NoSpace."""
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.PIPE}
    async with sandboxed(ids, directory, "rw", _UNLIMITED, (*_EXTRACT, "--file=-"), **pipes) as process:
        assert process.stdin is not None and process.stderr is not None  # noqa: S101 -- pipes, as asked for
        errors = asyncio.ensure_future(tail(process.stderr))
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
    """Unpack an image's archive from where `archive` stands on, compressed or not; nothing below /dev is taken.

    Raises InvalidRequest for an archive that tar refuses, TooLarge beyond the bounds, NoSpace.
    """
    magic = os.pread(archive.fileno(), 8, os.lseek(archive.fileno(), 0, os.SEEK_CUR))
    found = [program for start, program in COMPRESSIONS.values() if magic.startswith(start)]
    compression = [f"--use-compress-program={' '.join(program)}" for program in found]
    program = (*_EXTRACT, *compression, "--anchored", *_DEVICES, "--verbose", "--file=-")
    pipes = {"stdin": archive, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    async with sandboxed(ids, directory, "rw", bounds.file_size, program, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None  # noqa: S101 -- pipes, as asked for
        errors = asyncio.ensure_future(tail(process.stderr))
        try:
            async with bomb_guard(process, bounds.decompressed):
                left = bounds.entries
                # A name a line; a line break in a name is written as \n.
                while names := await process.stdout.read(CHUNK):
                    left -= names.count(b"\n")
                    if left < 0:
                        raise TooLarge(f"the image has more than {bounds.entries} files")
                _check(await process.wait(), await errors, InvalidRequest)
        finally:
            errors.cancel()


async def tail(stream: asyncio.StreamReader) -> str:
    """The end of what a program prints, read as it comes."""
    kept = b""
    while data := await stream.read(65536):
        kept = (kept + data)[-2000:]
    return kept.decode(errors="replace")


def _check(code: int, errors: str, kind: type[DriverFailed] | type[InvalidRequest] = DriverFailed) -> None:
    if code == 0:
        return
    text = explained(errors)
    if "No space left" in text or "quota exceeded" in text.lower():
        raise NoSpace(f"there is no room for the files: {text}")
    if "memory exhausted" in text:
        raise TooLarge(f"it takes too much memory to unpack: {text}")
    if code == -signal.SIGXFSZ or "File size limit" in text or "File too large" in text:
        raise TooLarge(f"a file in the archive is too large: {text or 'over the limit of one file'}")
    raise kind(f"the archive cannot be worked on (code {code}): {text or 'tar printed nothing'}")
