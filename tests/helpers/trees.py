"""What a directory tree is, down to its blocks and attributes, so that two of them can be compared."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def describe(root: Path, first_id: int = 0) -> dict[str, dict[str, Any]]:
    """Every entry below `root` by its path: type, mode, owner (less `first_id`), content, links, attributes, holes.

    Times are in it but for directories, whose listing a container's own start may change. Follows no link.
    """
    found: dict[str, dict[str, Any]] = {}
    first_of: dict[tuple[int, int], str] = {}
    for path in sorted(_below(root), key=os.fspath):
        name = os.fsencode(path.relative_to(root)).decode("latin-1")
        found[name] = _entry(path, name, first_id, first_of)
    return found


def _below(root: Path) -> Iterator[Path]:
    """All paths, however deep they are: the standard library calls itself for every level (until Python 3.13)."""
    waiting = [root]
    while waiting:
        for path in waiting.pop().iterdir():
            yield path
            if path.is_dir() and not path.is_symlink():
                waiting.append(path)


def _entry(path: Path, name: str, first_id: int, first_of: dict[tuple[int, int], str]) -> dict[str, Any]:
    status = path.lstat()
    entry: dict[str, Any] = {
        "mode": oct(status.st_mode),
        "owner": (status.st_uid - first_id, status.st_gid - first_id),
        "attributes": {key: os.getxattr(path, key, follow_symlinks=False).hex() for key in _attributes(path)},
    }
    if stat.S_ISLNK(status.st_mode):
        entry["target"] = os.fsencode(path.readlink()).decode("latin-1")
    elif stat.S_ISREG(status.st_mode):
        with path.open("rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        entry["size"], entry["modified"] = status.st_size, status.st_mtime_ns
        entry["holes"] = status.st_blocks * 512 < status.st_size // 2
        entry["same as"] = first_of.setdefault((status.st_dev, status.st_ino), name)
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        entry["device"] = status.st_rdev
    return entry


def _attributes(path: Path) -> list[str]:
    return sorted(key for key in os.listxattr(path, follow_symlinks=False) if not key.startswith("btrfs."))


def difference(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], but: tuple[str, ...] = ()) -> str:
    """What is not the same in both, but for these paths; empty when all is."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in but and before.get(name) != after.get(name):
            lines.append(f"{name}: {before.get(name)} -> {after.get(name)}")
    return "\n".join(lines)
