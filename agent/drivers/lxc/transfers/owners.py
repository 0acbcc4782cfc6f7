"""Whose the files in a received subvolume are, read from the file system's own tree.

A stream says it by paths, and what a path leads to is decided by links in it; a file that was left to the host's root
could have its setuid bit. The tree has every inode, by whatever name.
"""

from __future__ import annotations

import stat
from pathlib import Path

from agent.drivers.lxc.ids import IdMap
from agent.drivers.lxc.transfers.guard import NOTES
from agent.storage import btrfs_ioctl as btrfs
from common.errors import InvalidRequest


def check_owners(path: Path, ids: IdMap | None, since: int) -> None:
    """Raise InvalidRequest unless all that was made or changed since that transaction is inside the id map.

    Only the subvolume itself and plain files of our own, as many as there are notes, may be the host's root's.
    """
    if ids is None:
        return
    own = 0
    inside = range(ids.first, ids.first + ids.count)
    for number, user, group, mode in btrfs.inodes(path, since):
        if (user in inside and group in inside) or number == btrfs.SUBVOLUME_INODE:
            continue
        own += 1
        plain = stat.S_ISREG(mode) and not mode & (stat.S_ISUID | stat.S_ISGID)
        if (user, group) != (0, 0) or not plain or own > len(NOTES):
            raise InvalidRequest(f"a file of the container belongs to {user}:{group}, which is not in its id map")
