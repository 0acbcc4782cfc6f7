"""The id map of unprivileged containers, and root's right to use it (subuid(5), subgid(5))."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MARK = "ids-allowed"
"""Name of the mark in the state directory."""
FILES = (Path("/etc/subuid"), Path("/etc/subgid"))


@dataclass(frozen=True)
class IdMap:
    """Ids 0 to `count` - 1 of a container are `first` onwards on the host."""

    first: int
    count: int

    def __str__(self) -> str:
        return f"{self.first}:{self.count}"

    @property
    def line(self) -> str:
        """Root's entry for this range in /etc/subuid and /etc/subgid."""
        return f"root:{self.first}:{self.count}"


def allow(ids: IdMap, mark: Path, files: tuple[Path, ...] = FILES) -> None:
    """Give root the right to the range, as far as it has it not. `mark` notes that this node has added a line.

    Each node of a machine adds a line of its own, though they may be the same, so that one can go without the others.
    """
    if all(_given(_lines(file), ids, mark.exists()) for file in files):
        return
    for file in files:
        _rewrite(file, lambda lines: lines if _given(lines, ids, mark.exists()) else [*lines, ids.line])
    mark.touch()


def _given(lines: list[str], ids: IdMap, marked: bool) -> bool:
    """Whether the range is root's by our own line, or by one that no other node can take away."""
    return any(_covers(line, ids) and (line != ids.line or marked) for line in lines)


def withdraw(ids: IdMap, mark: Path, files: tuple[Path, ...] = FILES) -> None:
    """Take the line away that `allow` added. Absent is fine."""
    if not mark.exists():
        return
    for file in files:
        _rewrite(file, lambda lines: _without_one(lines, ids.line))
    mark.unlink()


def _without_one(lines: list[str], line: str) -> list[str]:
    place = lines.index(line) if line in lines else len(lines)
    return lines[:place] + lines[place + 1 :]


def _covers(line: str, ids: IdMap) -> bool:
    owner, first, count = ([*line.split(":"), "", ""])[:3]
    if owner not in ("root", "0") or not first.isdecimal() or not count.isdecimal():
        return False
    return int(first) <= ids.first and ids.first + ids.count <= int(first) + int(count)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if file.exists() else []


def _rewrite(file: Path, change: Callable[[list[str]], list[str]]) -> None:
    # Several agents of one machine may do this at once.
    lock = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = "".join(f"{line}\n" for line in change(_lines(file)))
        new = file.with_name(f".{file.name}.new")
        new.write_text(text, encoding="utf-8", errors="surrogateescape")
        new.chmod(0o644)
        new.replace(file)
    finally:
        os.close(lock)
