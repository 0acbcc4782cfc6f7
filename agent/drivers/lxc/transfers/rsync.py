"""One tree of files by rsync (rsync(1)), of which both ends run in the sandbox as the container's mapped root.

The sender's is the client, whose "remote shell" joins the protocol's pipes to its standard input and output; the
receiver's is the server, with the arguments that such a client would ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from agent.drivers.lxc import archive
from agent.drivers.lxc.ids import IdMap
from agent.drivers.lxc.transfers.frames import Frames
from common.archives import explained, printable
from common.errors import DriverFailed, InvalidRequest, NoSpace, Unsupported

_PIECE = 256 * 1024
_UNLIMITED = 2**62
CLOCK_STEP = 1.0
"""Seconds by which two readings of one clock may be apart."""
# A hole is sent as zeros, so it is compressed, by what costs least.
_OPTIONS = ("--numeric-ids", "--delete", "--modify-window=-1", "--compress-choice=lz4")
# What tar takes along too; what else there is counts for one file system or one host only.
_XATTRS = ("--filter=+x user.*", "--filter=+x security.capability", "--filter=-x *")
_JOIN = 'bash -c "cat <&0 >&4 & exec cat <&3"'
_CLIENT = (
    *("sh", "-c", 'exec 3<&0 4>&1 1>&2; exec "$@"', "sh"),
    *("rsync", "-aHAXSz", *_OPTIONS, *_XATTRS, "--rsh", _JOIN, "/data/", "peer:/data/"),
)
# The letters after `e` say what the client can do: that is rsync 3.2.4 and later.
_SERVER = ("rsync", "--server", "-lHogDtpAXrSze.iLsfxCIvu", *_OPTIONS, ".", "/data/")
_VANISHED = 24
_PARTIAL = 23
_GONE = re.compile(
    r"(?:file|directory) has vanished|failed verification -- update discarded|read errors mapping|"
    r"send_files failed to open .*No such file|readlink.* failed: No such file|link_stat .*No such file|"
    r"some files.* vanished before|some files/attrs were not transferred|IO error encountered"
)
_NODE = re.compile(r'mknod "?(?P<path>.+?)"? failed: Operation not permitted')


def require() -> None:
    """Raise Unsupported where there is no rsync."""
    if not available():
        raise Unsupported("rsync is not installed on this node (Debian: apt install rsync)", field="format")


def available() -> bool:
    """Whether there is an rsync."""
    return shutil.which("rsync") is not None


async def send(root: Path, ids: IdMap, frames: Frames, sent: Callable[[int], None], *, changing: bool = False) -> None:
    """Make the tree at the other end like `root`; `changing`: what changes meanwhile is no error.

    Raises InvalidRequest for what cannot be made there, DriverFailed.
    """
    code, errors = await _joined(root, ids, "ro", _CLIENT, frames, sent)
    if changing and (code == _VANISHED or (code == _PARTIAL and _only_gone(errors))):
        return
    _check(code, errors)


async def receive(root: Path, ids: IdMap, frames: Frames, *, changing: bool = False) -> None:
    """Make `root` like the tree at the other end. Raises InvalidRequest, NoSpace, DriverFailed."""
    code, errors = await _joined(root, ids, "rw", _SERVER, frames, lambda _count: None)
    if changing and (code == _VANISHED or (code == _PARTIAL and _only_gone(errors))):
        return
    _check(code, errors)


async def doubt(root: Path, ids: IdMap, since: float) -> None:
    """Have files that were written to since then compared by their content, by a time that no file has.

    A store into a mapped page that was written before, and not synced since, leaves the file's time as it is (mmap(2)):
    what an earlier round took may be older than what has the same size and time now. Raises DriverFailed.
    """
    written = ("-type", "f", "-newermt", f"@{since - CLOCK_STEP:.3f}")
    program = ("find", "/data", *written, "-exec", "touch", "--no-create", "--date=@1", "--", "{}", "+")
    pipe = asyncio.subprocess.PIPE
    async with archive.sandboxed(ids, root, "rw", _UNLIMITED, program, stdout=pipe, stderr=pipe) as process:
        _, errors = await process.communicate()
        if process.returncode != 0:
            raise DriverFailed(f"times cannot be set: {printable(errors[-300:].decode(errors='replace'))}")


async def _joined(
    root: Path, ids: IdMap, mode: str, program: tuple[str, ...], frames: Frames, moved: Callable[[int], None]
) -> tuple[int, str]:
    """Run a program whose standard input and output are the frames; its code and the end of what it complained of."""
    pipe = asyncio.subprocess.PIPE
    async with archive.sandboxed(ids, root, mode, _UNLIMITED, program, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None  # noqa: S101
        works = [
            asyncio.ensure_future(archive.tail(process.stderr)),
            asyncio.ensure_future(_out(process.stdout, frames, moved)),
            asyncio.ensure_future(_in(process.stdin, frames.volume())),
        ]
        try:
            errors, *_ = await asyncio.gather(*works)
            return await process.wait(), str(errors)
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)


async def _out(stream: asyncio.StreamReader, frames: Frames, moved: Callable[[int], None]) -> None:
    while data := await stream.read(_PIECE):
        await frames.write(data)
        moved(len(data))
    await frames.end_volume()


async def _in(stream: asyncio.StreamWriter, pieces: AsyncIterator[memoryview]) -> None:
    async for piece in pieces:
        # The program may have ended already, and say why; what still comes is not for it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stream.write(piece)
            await stream.drain()
    stream.close()


def _only_gone(errors: str) -> bool:
    """Whether nothing else is complained of than files that changed or went meanwhile."""
    lines = [line for line in errors.splitlines() if line.strip()]
    return bool(lines) and all(_GONE.search(line) for line in lines)


def _check(code: int, errors: str) -> None:
    if code == 0:
        return
    node = _NODE.search(errors)
    if node is not None:
        name = printable(node["path"].removeprefix("/data/"))
        raise InvalidRequest(f"the container holds a device node, which cannot be taken: {name}")
    text = explained(errors)
    if "No space left" in text or "quota exceeded" in text.lower():
        raise NoSpace(f"there is no room for the container: {text}")
    raise DriverFailed(f"rsync ended with code {code}: {text or 'it printed nothing'}")
