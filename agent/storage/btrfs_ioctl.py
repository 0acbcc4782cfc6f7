"""The few btrfs calls of the kernel that storage needs, made directly: a subprocess each would cost more than they do.

Structures and numbers are those of <linux/btrfs.h> and <linux/btrfs_tree.h>. All raise OSError, all may block for a
commit of the file system, and are therefore called in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SNAP_CREATE_V2 = 0x50009417
SUBVOL_CREATE_V2 = 0x50009418
SNAP_DESTROY_V2 = 0x5000943F
TREE_SEARCH = 0xD0009411
TREE_SEARCH_V2 = 0xC0709411
INO_LOOKUP = 0xD0009412
FS_INFO = 0x8400941F
GET_SUBVOL_INFO = 0x81F8943C
QUOTA_CTL = 0xC0109428
QGROUP_CREATE = 0x4010942A
QGROUP_LIMIT = 0x8030942B
QUOTA_RESCAN = 0x4040942C
QUOTA_RESCAN_WAIT = 0x942E

SUBVOLUME_INODE = 256
_READ_ONLY = 1 << 1
_ROOT_READ_ONLY = 1 << 0
_BY_ID = 1 << 4
_QUOTA_ENABLE = 1
_LIMIT_REFERENCED = 1
_NO_LIMIT = 2**64 - 1
_ROOT_TREE = 1
_ROOT_REF = 156
_INODE_ITEM = 1
_LAST = 2**64 - 1
_SEARCH_ROOM = 1024 * 1024
_OWNERS = struct.Struct("=3I")
_OWNERS_AT = 44
_VOLUME_ARGS = struct.Struct("=qQQ32x4040s")
_SEARCH_KEY = struct.Struct("=7Q4I4Q")
_SEARCH_HEADER = struct.Struct("=3Q2I")


def _volume_arguments(descriptor: int, flags: int, target: bytes) -> bytearray:
    # A bytearray, because fcntl.ioctl takes at most 1,024 immutable bytes.
    return bytearray(_VOLUME_ARGS.pack(descriptor, 0, flags, target))


@contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor of a directory that is no symbolic link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def create_subvolume(path: Path) -> None:
    """Make an empty subvolume."""
    with directory(path.parent) as parent:
        fcntl.ioctl(parent, SUBVOL_CREATE_V2, _volume_arguments(0, 0, os.fsencode(path.name)))


def snapshot(source: Path, path: Path, *, read_only: bool = False) -> None:
    """Make a snapshot of a subvolume. It is on disk when this returns."""
    flags = _READ_ONLY if read_only else 0
    with directory(source) as origin, directory(path.parent) as parent:
        fcntl.ioctl(parent, SNAP_CREATE_V2, _volume_arguments(origin, flags, os.fsencode(path.name)))


def subvolume_id(path: Path) -> int:
    """The id of the subvolume in which a directory is."""
    with directory(path) as descriptor:
        return _tree_of(descriptor, 0)


@dataclass(frozen=True)
class SubvolumeInfo:
    """What the kernel knows of a subvolume. `made_at`: the transaction in which it was made."""

    read_only: bool
    received_uuid: bytes
    made_at: int


def subvolume_info(path: Path) -> SubvolumeInfo:
    """The facts of the subvolume at `path` (btrfs_ioctl_get_subvol_info_args)."""
    arguments = bytearray(504)
    with directory(path) as descriptor:
        fcntl.ioctl(descriptor, GET_SUBVOL_INFO, arguments)
    flags, received, made_at = struct.unpack_from("=Q32x16s8xQ", arguments, 288)
    return SubvolumeInfo(bool(flags & _ROOT_READ_ONLY), received, made_at)


def inodes(path: Path, since: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, user, group, mode) of the inodes in a subvolume that were changed in transaction `since` or later.

    Others may be among them, as the kernel skips whole leaves of the tree. Read from the tree itself: no name in the
    subvolume can hide one. True of what is on disk.
    """
    number = 0
    with directory(path) as descriptor:
        while True:
            key = _SEARCH_KEY.pack(
                0, number, _LAST, 0, _LAST, since, _LAST, _INODE_ITEM, _INODE_ITEM, 2**32 - 1, 0, *[0] * 4
            )
            buffer = bytearray(_SEARCH_KEY.size + 8 + _SEARCH_ROOM)
            buffer[: _SEARCH_KEY.size] = key
            struct.pack_into("=Q", buffer, _SEARCH_KEY.size, _SEARCH_ROOM)
            fcntl.ioctl(descriptor, TREE_SEARCH_V2, buffer)
            count = struct.unpack_from("=I", buffer, 64)[0]
            position = _SEARCH_KEY.size + 8
            for _ in range(count):
                _, number, _, kind, length = _SEARCH_HEADER.unpack_from(buffer, position)
                position += _SEARCH_HEADER.size
                if kind == _INODE_ITEM:
                    yield (number, *_OWNERS.unpack_from(buffer, position + _OWNERS_AT))
                position += length
            if count == 0:
                return
            number += 1


def exists(pool: int, subvolume: int) -> bool:
    """Whether a subvolume with this id exists in the file system of the descriptor `pool`."""
    try:
        _tree_of(pool, subvolume)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def _tree_of(descriptor: int, tree: int) -> int:
    arguments = bytearray(struct.pack("=QQ4080x", tree, SUBVOLUME_INODE))
    fcntl.ioctl(descriptor, INO_LOOKUP, arguments)
    return int(struct.unpack_from("=Q", arguments)[0])


def delete_subvolume(path: Path) -> None:
    """Delete a subvolume with all subvolumes inside it, wherever they are in it."""
    with directory(path) as root:
        order = list(_descendants(root, _tree_of(root, 0)))
    with directory(path.parent) as parent:
        for subvolume in order:
            fcntl.ioctl(parent, SNAP_DESTROY_V2, _volume_arguments(0, _BY_ID, struct.pack("=Q", subvolume)))
            drop_qgroup(parent, subvolume)
        identifier = subvolume_id(path)
        fcntl.ioctl(parent, SNAP_DESTROY_V2, _volume_arguments(0, 0, os.fsencode(path.name)))
        drop_qgroup(parent, identifier)


def has_nested(path: Path) -> bool:
    """Whether subvolumes are inside the one at `path`."""
    with directory(path) as descriptor:
        return bool(_children(descriptor, _tree_of(descriptor, 0)))


def _descendants(descriptor: int, subvolume: int) -> Iterator[int]:
    """The ids of all subvolumes inside one, the innermost first."""
    found: list[int] = []
    waiting = [subvolume]
    while waiting:
        children = _children(descriptor, waiting.pop())
        found.extend(children)
        waiting.extend(children)
    return reversed(found)


def _children(descriptor: int, subvolume: int) -> list[int]:
    children: list[int] = []
    offset = 0
    while True:
        key = _SEARCH_KEY.pack(
            *(_ROOT_TREE, subvolume, subvolume, offset, _NO_LIMIT, 0, _NO_LIMIT),
            *(_ROOT_REF, _ROOT_REF, 64, 0),
            *[0] * 4,
        )
        buffer = bytearray(key.ljust(4096, b"\0"))
        fcntl.ioctl(descriptor, TREE_SEARCH, buffer)
        count = struct.unpack_from("=I", buffer, 64)[0]
        position = _SEARCH_KEY.size
        for _ in range(count):
            _, _, child, _, length = _SEARCH_HEADER.unpack_from(buffer, position)
            children.append(child)
            position += _SEARCH_HEADER.size + length
        if count == 0:
            return children
        offset = children[-1] + 1


def filesystem_id(path: Path) -> str:
    """The UUID of the file system, as it stands in /sys/fs/btrfs."""
    buffer = bytearray(1024)
    with directory(path) as descriptor:
        fcntl.ioctl(descriptor, FS_INFO, buffer)
    return str(uuid.UUID(bytes=bytes(buffer[16:32])))


def enable_quotas(path: Path) -> None:
    """Turn on quota groups and wait until what exists is counted. Already on is fine."""
    with directory(path) as descriptor:
        fcntl.ioctl(descriptor, QUOTA_CTL, bytearray(struct.pack("=QQ", _QUOTA_ENABLE, 0)))
        fcntl.ioctl(descriptor, QUOTA_RESCAN_WAIT)


def set_limit(path: Path, size: int | None) -> None:
    """Limit what the subvolume at `path` refers to, or take the limit away."""
    limit = _NO_LIMIT if size is None else size
    with directory(path) as descriptor:
        fcntl.ioctl(descriptor, QGROUP_LIMIT, struct.pack("=6Q", 0, _LIMIT_REFERENCED, limit, 0, 0, 0))


def drop_qgroup(pool: int, subvolume: int) -> None:
    """Remove the quota group of a deleted subvolume, now or (where the kernel still counts down) by itself later."""
    try:
        fcntl.ioctl(pool, QGROUP_CREATE, struct.pack("=QQ", 0, subvolume))
    except OSError as error:
        # Linux 6.12 and later refuse until the subvolume is cleaned up, and then remove the group themselves.
        if error.errno not in (errno.EBUSY, errno.ENOENT, errno.ENOTCONN, errno.EINVAL):
            raise
