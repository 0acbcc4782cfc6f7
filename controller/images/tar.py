"""GNU tar as a reader of hostile archives: it lists and prints, in bounded memory and time, and writes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from common import process
from common.archives import MEMORY, bomb_guard, explained
from common.errors import DeadlinePassed, InvalidRequest, TooLarge

_CHUNK = 64 * 1024
_LAST_ERRORS = 2048


class Reader:
    """Reads one archive. `decompressor` is a program with its options, or empty.

    Each run takes at most `timeout` seconds and reads at most `limit` bytes of what the decompressor gives. The archive
    begins at `offset` of the file.
    """

    def __init__(self, path: Path, decompressor: Sequence[str], timeout: float, limit: int, offset: int = 0) -> None:
        # Escaped names stay on one line each.
        self._options = ["--quoting-style=escape", "--file=-"]
        self._path = path
        self._offset = offset
        if decompressor:
            self._options.append(f"--use-compress-program={' '.join(decompressor)}")
        self._timeout = timeout
        self._limit = limit

    async def names(self, longest: int) -> AsyncGenerator[str, None]:
        """The members' names, directories with a slash at the end, as GNU tar escapes them.

        Raises InvalidRequest when the archive is damaged or a name is longer than `longest` bytes, DeadlinePassed.
        """
        rest = b""
        async with contextlib.aclosing(self._output(["--list", *self._options])) as output:
            async for chunk in output:
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > longest or any(len(line) > longest for line in lines):
                    raise InvalidRequest("a name in the archive is too long", allowed=f"at most {longest} bytes")
                for line in lines:
                    yield line.decode(errors="replace")

    async def print_member(self, name: str, limit: int) -> bytes:
        """The content of the first member with this name; empty when it is not a file. Raises TooLarge over `limit`."""
        arguments = ["--extract", "--to-stdout", "--occurrence=1", "--no-recursion", "--no-wildcards", *self._options]
        content = b""
        async with contextlib.aclosing(self._output([*arguments, "--", name])) as output:
            async for chunk in output:
                content += chunk
                if len(content) > limit:
                    raise TooLarge(f"{name} in the archive is too large", allowed=f"at most {limit} bytes")
        return content

    async def _start(self, arguments: list[str]) -> asyncio.subprocess.Process:
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._offset)
            return await asyncio.create_subprocess_exec(
                *("prlimit", f"--as={MEMORY}", "--core=0", "--fsize=0", "--", "tar", *arguments),
                stdin=file,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            )

    async def _output(self, arguments: list[str]) -> AsyncGenerator[bytes, None]:
        """What tar prints, in chunks; it is killed with its children when the reader stops, and at the time-out."""
        tar = await self._start(arguments)
        assert tar.stdout is not None and tar.stderr is not None  # noqa: S101 - both are pipes
        errors = asyncio.create_task(_last(tar.stderr))
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            async with bomb_guard(tar, self._limit):
                try:
                    while chunk := await asyncio.wait_for(tar.stdout.read(_CHUNK), _left(deadline)):
                        yield chunk
                    code = await asyncio.wait_for(tar.wait(), _left(deadline))
                except TimeoutError:
                    raise DeadlinePassed(f"reading the archive took longer than {self._timeout:g} s") from None
                if code != 0:
                    text = explained(await errors) or f"tar ended with code {code}"
                    raise InvalidRequest(f"the archive is damaged: {text}")
        finally:
            errors.cancel()
            await process.end(tar)


def _left(deadline: float) -> float:
    return deadline - asyncio.get_running_loop().time()


async def _last(stream: asyncio.StreamReader) -> str:
    """Read to the end; gives the last of it."""
    kept = b""
    while chunk := await stream.read(_CHUNK):
        kept = (kept + chunk)[-_LAST_ERRORS:]
    return kept.decode(errors="replace")
