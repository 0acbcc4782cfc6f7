"""Reading and writing cgroup files, whose directories may vanish at any moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import DriverFailed

# A removed cgroup answers ENODEV on files that are open, a threaded one EOPNOTSUPP on cgroup.procs.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESRCH, errno.EOPNOTSUPP})
_CHUNK = 65536


def read_text(path: Path | str) -> str | None:
    """The content of a small kernel file (at most 64 KiB); None when it does not exist or is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    try:
        return os.read(descriptor, _CHUNK).decode("ascii", "replace")
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    finally:
        os.close(descriptor)


def read_number(path: Path | str) -> int | None:
    """The whole number that a file holds; None when the file is not there or says `max` (no limit)."""
    text = (read_text(path) or "").strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def read_keys(path: Path | str) -> dict[str, int]:
    """A "flat keyed" file (Documentation/admin-guide/cgroup-v2.rst): `name number` a line. Empty when it is gone."""
    rows = (line.split() for line in (read_text(path) or "").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}


def write_text(path: Path, text: str) -> None:
    """Write a kernel file in one write(2). Raises DriverFailed naming the file and the reason."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = f"{path} does not take {text.strip()!r}: {error.strerror}"
        raise DriverFailed(reason, details={"errno": error.errno}) from error


def make_directory(path: Path) -> None:
    """Make one cgroup directory unless it is there. Raises DriverFailed."""
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise DriverFailed(f"{path} cannot be made: {error.strerror}") from error


def _children(descriptor: int) -> list[str]:
    with os.scandir(descriptor) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def walk(path: Path) -> Iterator[Path]:
    """A cgroup and all below it, parents first; what vanishes meanwhile is left out.

    What is below the inner directory is the container's own work, so depth and names are hostile: what is deeper than
    a path may be long (4096 bytes) is left out.
    """
    waiting = [path]
    while waiting:
        current = waiting.pop()
        try:
            with os.scandir(current) as entries:
                waiting.extend(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError as error:
            if error.errno not in _GONE | {errno.ENAMETOOLONG}:
                raise
            continue
        yield current


def remove_tree(path: Path) -> bool:
    """Remove a cgroup with all below it, as far as no process is left in them; True when nothing is there any more.

    Works by descriptors relative to each other: a container can nest cgroups deeper than any path can name.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _GONE:
            return True
        raise
    levels: list[tuple[str, list[str]]] = [("", _children(descriptor))]
    try:
        while len(levels) > 1 or levels[0][1]:
            names = levels[-1][1]
            if names:
                name = names.pop()
                below = _enter(descriptor, name)
                if below is not None:
                    os.close(descriptor)
                    descriptor = below
                    levels.append((name, _children(descriptor)))
                continue
            name = levels.pop()[0]
            above = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = above
            _remove_empty(name, descriptor)
    finally:
        os.close(descriptor)
    return _remove_empty(str(path), None)


def _enter(descriptor: int, name: str) -> int | None:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=descriptor)
    except FileNotFoundError:
        return None


def _remove_empty(name: str, descriptor: int | None) -> bool:
    try:
        os.rmdir(name, dir_fd=descriptor)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True


def parse_cpus(text: str) -> list[int]:
    """CPU numbers of a list such as `0-2,5` (cpuset(7), "List format")."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def format_cpus(cpus: Iterable[int]) -> str:
    """CPU numbers in cpuset(7)'s list format."""
    return ",".join(str(cpu) for cpu in sorted(set(cpus)))
