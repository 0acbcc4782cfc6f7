"""One volume as a btrfs stream, by `btrfs send` and `btrfs receive` (btrfs-send(8), btrfs-receive(8))."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from agent.drivers.lxc import archive
from agent.drivers.lxc.transfers.guard import Guard
from agent.drivers.lxc.transfers.owners import check_owners
from agent.storage import btrfs_ioctl
from common.archives import explained
from common.errors import DriverFailed, InvalidRequest, NoSpace
from common.process import end

_PIECE = 512 * 1024
_PIPE = 1024 * 1024
_UNLIMITED = 2**62
_POLL = 0.002


async def send(path: Path, parent: Path | None) -> AsyncGenerator[bytes, None]:
    """The stream of a read-only subvolume, as a difference from `parent`. Raises DriverFailed."""
    base = ("-p", str(parent)) if parent is not None else ()
    process = await asyncio.create_subprocess_exec(
        *("btrfs", "send", "--quiet", "--proto", "1", *base, "--", str(path)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=_PIECE,
    )
    assert process.stdout is not None and process.stderr is not None  # noqa: S101 -- pipes, as asked for
    _widen(process, 1)
    errors = asyncio.ensure_future(archive.tail(process.stderr))
    try:
        while data := await process.stdout.read(_PIECE):
            yield data
        if await process.wait() != 0:
            raise DriverFailed(f"btrfs send failed: {explained(await errors)}")
    finally:
        errors.cancel()
        await end(process)


async def receive(directory: Path, pieces: AsyncIterator[memoryview], guard: Guard, limit: int) -> None:
    """Make the subvolume `guard.name` in the subvolume `directory` from a stream, of at most `limit` bytes.

    Raises InvalidRequest for a stream that must not be taken, NoSpace, DriverFailed; then it may be there in part.
    """
    target = directory / guard.name
    program = ("btrfs", "--quiet", "receive", "-m", "/data", "/data")
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.PIPE}
    async with archive.sandboxed(None, directory, "rw", _UNLIMITED, program, **pipes) as process:
        assert process.stdin is not None and process.stderr is not None  # noqa: S101 -- pipes, as asked for
        _widen(process, 0)
        errors = asyncio.ensure_future(archive.tail(process.stderr))
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended early, and says why below
                await _feed(process, pieces, guard, target, limit)
            _check(await process.wait(), await errors)
        finally:
            errors.cancel()
    guard.finish()
    await asyncio.to_thread(_verify, target, guard)


async def _feed(
    process: asyncio.subprocess.Process, pieces: AsyncIterator[memoryview], guard: Guard, target: Path, limit: int
) -> None:
    assert process.stdin is not None  # noqa: S101 -- a pipe, as asked for
    limited = False
    async for piece in pieces:
        passed = await asyncio.to_thread(guard.feed, piece)
        process.stdin.write(passed)
        await process.stdin.drain()
        if guard.begun and not limited:
            await _limit(process, target, limit)
            limited = True
    guard.finish()
    process.stdin.close()


async def _limit(process: asyncio.subprocess.Process, target: Path, limit: int) -> None:
    """Limit the subvolume as soon as it is there."""
    while process.returncode is None and not target.is_dir():  # noqa: ASYNC110 -- nothing tells
        await asyncio.sleep(_POLL)
    if target.is_dir():
        await asyncio.to_thread(btrfs_ioctl.set_limit, target, limit)


def _verify(target: Path, guard: Guard) -> None:
    facts = btrfs_ioctl.subvolume_info(target)
    if not facts.read_only:
        raise DriverFailed("btrfs receive has not finished the subvolume")
    check_owners(target, guard.ids, facts.made_at if guard.parent is not None else 0)


def _check(code: int, errors: str) -> None:
    if code == 0:
        return
    text = explained(errors)
    if "No space left" in text or "quota exceeded" in text.lower():
        raise NoSpace(f"there is no room for the container: {text}")
    raise InvalidRequest(f"the btrfs stream cannot be received: {text or f'code {code}'}")


def _widen(process: asyncio.subprocess.Process, descriptor: int) -> None:
    """Fewer and larger pieces: the pipe holds more than the kernel's 64 KiB (pipe(7))."""
    pipe = process._transport.get_pipe_transport(descriptor).get_extra_info("pipe")  # type: ignore[attr-defined]
    # Not where the user has too many wide ones already, and not when the program has ended.
    if not pipe.closed:
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)
