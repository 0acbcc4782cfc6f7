"""The id map of unprivileged containers, and root's right to use it (subuid(5), subgid(5))."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FILES = (Path("/etc/subuid"), Path("/etc/subgid"))


@dataclass(frozen=True)
class IdMap:
    """Ids 0 to `count` - 1 of a container are `first` onwards on the host."""

    first: int
    count: int

    @property
    def line(self) -> str:
        """Root's entry for this range in /etc/subuid and /etc/subgid."""
        return f"root:{self.first}:{self.count}"


def allow(ids: IdMap, files: tuple[Path, ...] = FILES) -> bool:
    """Give root the right to the range, as far as it has it not. True when a line was added."""
    missing = [file for file in files if not _covered(_lines(file), ids)]
    for file in missing:
        _rewrite(file, lambda lines: lines if _covered(lines, ids) else [*lines, ids.line])
    return bool(missing)


def withdraw(ids: IdMap, files: tuple[Path, ...] = FILES) -> None:
    """Take the line away that `allow` added. Absent is fine."""
    for file in files:
        if ids.line in _lines(file):
            _rewrite(file, lambda lines: [line for line in lines if line != ids.line])


def _covered(lines: list[str], ids: IdMap) -> bool:
    return any(_covers(line, ids) for line in lines)


def _covers(line: str, ids: IdMap) -> bool:
    owner, first, count = ([*line.split(":"), "", ""])[:3]
    if owner not in ("root", "0") or not first.isdecimal() or not count.isdecimal():
        return False
    return int(first) <= ids.first and ids.first + ids.count <= int(first) + int(count)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if file.exists() else []


def _rewrite(file: Path, change: Callable[[list[str]], list[str]]) -> None:
    # Several agents of one machine may do this at once.
    lock = os.open(
        file.with_name(f".{file.name}.vzfleet"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = "".join(f"{line}\n" for line in change(_lines(file)))
        new = file.with_name(f".{file.name}.new")
        new.write_text(text, encoding="utf-8", errors="surrogateescape")
        new.chmod(0o644)
        new.replace(file)
    finally:
        file.with_name(f".{file.name}.vzfleet").unlink(missing_ok=True)
        os.close(lock)
