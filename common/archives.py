"""What an image's archive may grow to. The controller refuses at the import what nodes would refuse at the create."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from common.errors import TooLarge, VzfleetError
from common.process import shortened

MAX_ENTRIES = 2_000_000
"""Files, directories and links in it."""
MEMORY = 1024**3
"""Address space in bytes for tar and for the decompressor; extended headers and dictionaries are sized by the file."""
MAX_RATIO = 100
ALWAYS_ALLOWED = 256 * 1024**2
# The first bytes of each compression, and the program that unpacks it with bounded memory.
COMPRESSIONS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "gz": (b"\x1f\x8b", ("gzip",)),
    "xz": (b"\xfd7zXZ\x00", ("xz", "--threads=1", "--memlimit-decompress=256MiB")),
    "zst": (b"\x28\xb5\x2f\xfd", ("zstd", "--memory=256MB")),
    "bz2": (b"BZh", ("bzip2",)),
}
_LOOK_EVERY = 0.1
_IDLE = ("tar: Exiting with failure", "tar: Error is not recoverable", "tar: Skipping to next", "tar: Removing leading")
"""Lines of tar that say nothing of the cause."""
_LINES = 3


def decompressed_limit(size: int) -> int:
    """Bytes that a compressed archive of `size` bytes may unpack to: root file systems shrink to a half or a tenth."""
    return max(ALWAYS_ALLOWED, MAX_RATIO * size)


def explained(errors: str) -> str:
    """The last of what tar and a decompressor complained of, as one line that can be shown; names in it are hostile."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_IDLE)] or lines
    return printable("; ".join(shortened(line) for line in telling[-_LINES:]))


def printable(text: str) -> str:
    """The same without characters that could do something to a terminal or a line of a log."""
    return "".join(mark if mark.isprintable() else "?" for mark in text)


@asynccontextmanager
async def bomb_guard(reader: asyncio.subprocess.Process, limit: int) -> AsyncIterator[None]:
    """Kill a program that leads a session of its own once it has read more than `limit` bytes of an archive.

    Whatever error the block then raises becomes TooLarge.
    """
    guard = asyncio.create_task(_kill_beyond(reader, limit))
    try:
        yield
    except VzfleetError:
        if guard.done():
            raise _bomb(limit) from None
        raise
    finally:
        guard.cancel()
    if guard.done() and not guard.cancelled():
        raise _bomb(limit)


def _bomb(limit: int) -> TooLarge:
    allowed = f"at most {MAX_RATIO} times its own size, or {ALWAYS_ALLOWED} bytes"
    return TooLarge(f"the archive unpacks to more than {limit} bytes", allowed=allowed)


async def _kill_beyond(reader: asyncio.subprocess.Process, limit: int) -> None:
    """Return when it had to be killed; of one that ends by itself, never."""
    while reader.returncode is not None or _bytes_read(reader.pid) <= limit:  # noqa: ASYNC110 -- the kernel tells nobody
        await asyncio.sleep(_LOOK_EVERY)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(reader.pid, signal.SIGKILL)


def _bytes_read(process: int) -> int:
    """What it has read from files and pipes (proc(5), io); 0 of one that has ended."""
    try:
        text = Path(f"/proc/{process}/io").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.split(maxsplit=2)[1])
