"""What of a btrfs send stream may reach `btrfs receive`, which works as the host's root.

The format is that of <fs/btrfs/send.h> and fs/btrfs/send.c, version 1: a header, then commands, each with a length, a
type, a checksum and attributes. `Guard` lets whole commands pass and raises InvalidRequest for whatever is not on its
list; the checksums are checked by `btrfs receive` itself. What a path leads to the guard cannot know: links in it stay
in the sandbox, and who owns what is read from the file system afterwards (`owners.py`).
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.drivers.lxc.ids import IdMap
from common.archives import printable
from common.errors import InvalidRequest

MAGIC = b"btrfs-stream\0"
VERSION = 1
NOTES = ("image.json", "snapshot.json", "incomplete")
"""Files of our own beside `rootfs`."""
_OPENING = struct.Struct("<13sI")
_COMMAND = struct.Struct("<IHI")
_ATTRIBUTE = struct.Struct("<HH")
_NUMBER = struct.Struct("<Q")
_CAPABILITY = struct.Struct("<I")
_LONGEST_COMMAND = 64 * 1024
_LONGEST_PATH = 4095
_LONGEST_NAME = 255
_NO_ID = 2**32 - 1

(_SUBVOL, _SNAPSHOT, _MKFILE, _MKDIR, _MKNOD, _MKFIFO, _MKSOCK, _SYMLINK, _RENAME, _LINK, _UNLINK) = range(1, 12)
(_RMDIR, _SET_XATTR, _REMOVE_XATTR, _WRITE, _CLONE, _TRUNCATE, _CHMOD, _CHOWN, _UTIMES, _END) = range(12, 22)
(_UUID, _CTRANSID, _INO, _SIZE, _MODE, _UID, _GID, _RDEV, _CTIME, _MTIME, _ATIME, _OTIME) = range(1, 13)
(_XATTR_NAME, _XATTR_DATA, _PATH, _PATH_TO, _PATH_LINK, _OFFSET, _DATA) = range(13, 20)
(_CLONE_UUID, _CLONE_CTRANSID, _CLONE_PATH, _CLONE_OFFSET, _CLONE_LEN) = range(20, 25)

_MAKE = frozenset((_PATH, _INO))
_MAKE_NODE = _MAKE | {_RDEV, _MODE}
_ATTRIBUTES: dict[int, frozenset[int]] = {
    _SUBVOL: frozenset((_PATH, _UUID, _CTRANSID)),
    _SNAPSHOT: frozenset((_PATH, _UUID, _CTRANSID, _CLONE_UUID, _CLONE_CTRANSID)),
    _MKFILE: _MAKE,
    _MKDIR: _MAKE,
    _MKNOD: _MAKE_NODE,
    _MKFIFO: _MAKE_NODE,
    _MKSOCK: _MAKE_NODE,
    _SYMLINK: _MAKE | {_PATH_LINK},
    _RENAME: frozenset((_PATH, _PATH_TO)),
    _LINK: frozenset((_PATH, _PATH_LINK)),
    _UNLINK: frozenset((_PATH,)),
    _RMDIR: frozenset((_PATH,)),
    _SET_XATTR: frozenset((_PATH, _XATTR_NAME, _XATTR_DATA)),
    _REMOVE_XATTR: frozenset((_PATH, _XATTR_NAME)),
    _WRITE: frozenset((_PATH, _OFFSET, _DATA)),
    _CLONE: frozenset((_PATH, _OFFSET, _CLONE_LEN, _CLONE_UUID, _CLONE_CTRANSID, _CLONE_PATH, _CLONE_OFFSET)),
    _TRUNCATE: frozenset((_PATH, _SIZE)),
    _CHMOD: frozenset((_PATH, _MODE)),
    _CHOWN: frozenset((_PATH, _UID, _GID)),
    _UTIMES: frozenset((_PATH, _ATIME, _MTIME, _CTIME)),
    _END: frozenset(),
}
_LENGTHS: dict[int, int] = {
    **dict.fromkeys((_CTRANSID, _INO, _SIZE, _MODE, _UID, _GID, _RDEV, _OFFSET), 8),
    **dict.fromkeys((_CLONE_CTRANSID, _CLONE_OFFSET, _CLONE_LEN), 8),
    **dict.fromkeys((_UUID, _CLONE_UUID), 16),
    **dict.fromkeys((_CTIME, _MTIME, _ATIME, _OTIME), 12),
}
_NOTES = re.compile(b"|".join(re.escape(name.encode()) for name in NOTES))
# A file has the name o<inode>-<generation>-<number> until its directory stands (fs/btrfs/send.c, gen_unique_name).
_INSIDE = re.compile(rb"(?:rootfs|o\d{1,20}-\d{1,20}-\d{1,20})(?:/(?!\.{1,2}(?:/|\Z))[^/\0]{1,255})*", re.DOTALL)
_XATTRS = re.compile(
    rb"user\..+|security\.capability|system\.posix_acl_(?:access|default)|btrfs\.compression", re.DOTALL
)
_ROOTS_XATTRS = re.compile(rb"trusted\..+", re.DOTALL)

Attributes = dict[int, bytes]


@dataclass
class Guard:
    """Checks the stream of one subvolume, which must have this name, and be a snapshot of `parent` if there is one.

    `parent` and `sources` are received UUIDs: what files may be cloned from, besides the subvolume itself. `ids` is
    the id map of the container, None for a privileged one.
    """

    name: str
    ids: IdMap | None
    parent: bytes | None = None
    sources: frozenset[bytes] = frozenset()
    begun: bool = False
    """Whether the command that makes the subvolume has passed."""
    ended: bool = False
    _rest: bytes = b""
    _opened: bool = False
    _own: bytes = b""
    _node: bytes = b""
    """The first name of a device node; nothing passes from there on, and what follows tells the name it is to have."""
    _checks: dict[int, Callable[[Attributes], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path, pair = self._check_path, self._check_pair
        self._checks = {
            **dict.fromkeys((_MKFILE, _MKDIR, _MKFIFO, _MKSOCK, _SYMLINK, _WRITE, _TRUNCATE, _UNLINK, _RMDIR), path),
            **dict.fromkeys((_SUBVOL, _SNAPSHOT), self._check_subvolume),
            **dict.fromkeys((_RENAME, _LINK), pair),
            **dict.fromkeys((_SET_XATTR, _REMOVE_XATTR), self._check_xattr),
            _MKNOD: self._check_node,
            _CLONE: self._check_clone,
            _CHMOD: self._check_mode,
            _CHOWN: self._check_owner,
            _UTIMES: self._check_times,
            _END: self._check_end,
        }

    def feed(self, data: bytes | memoryview) -> bytes:
        """Take the next bytes; what may pass, which ends with a whole command. Raises InvalidRequest."""
        stream = self._rest + data
        position = 0
        if not self._opened:
            if len(stream) < _OPENING.size:
                self._rest = stream
                return b""
            self._open(*_OPENING.unpack_from(stream))
            position = _OPENING.size
        size = len(stream)
        passed = position
        while size - position >= _COMMAND.size:
            length, kind, _ = _COMMAND.unpack_from(stream, position)
            if length > _LONGEST_COMMAND:
                raise _refused("a command is too long")
            end = position + _COMMAND.size + length
            if end > size:
                break
            self._check(kind, stream, position + _COMMAND.size, end)
            position = end
            if not self._node:
                passed = position
        self._rest = stream[position:]
        return stream[:passed]

    def finish(self) -> None:
        """Raise InvalidRequest unless the stream has come to its end, and nothing after it."""
        if self._node:
            raise _device(self._node)
        if not self.ended or self._rest:
            raise _refused("it ends too early")

    def _open(self, magic: bytes, version: int) -> None:
        if magic != MAGIC:
            raise _refused("it is none")
        if version != VERSION:
            raise _refused(f"its version is {version}", f"version {VERSION}")
        self._opened = True

    def _check(self, kind: int, stream: bytes, position: int, end: int) -> None:
        expected = _ATTRIBUTES.get(kind)
        if expected is None:
            raise _refused(f"command {kind} is not known here")
        if self.ended:
            raise _refused("something follows its end")
        if self.begun is (kind in (_SUBVOL, _SNAPSHOT)):
            raise _refused("it makes another subvolume" if self.begun else "it does not begin with a subvolume")
        found: Attributes = {}
        while position < end:
            if end - position < _ATTRIBUTE.size:
                raise _refused("an attribute is cut")
            attribute, length = _ATTRIBUTE.unpack_from(stream, position)
            position += _ATTRIBUTE.size
            if attribute not in expected or attribute in found:
                raise _refused(f"command {kind} has attribute {attribute}")
            if position + length > end or _LENGTHS.get(attribute, length) != length:
                raise _refused(f"attribute {attribute} is {length} bytes long")
            # The data themselves are not looked at.
            found[attribute] = stream[position : position + length] if attribute != _DATA else b""
            position += length
        if len(found) != len(expected):
            raise _refused(f"command {kind} lacks an attribute")
        if self._node:
            renamed = kind == _RENAME and found[_PATH] == self._node
            raise _device(found[_PATH_TO] if renamed else self._node)
        self._checks[kind](found)

    def _check_subvolume(self, found: Attributes) -> None:
        if found[_PATH] != self.name.encode():
            raise _refused("the subvolume has another name than was said")
        if found.get(_CLONE_UUID) != self.parent:
            raise _refused("it is not based on the volume that was said")
        self._own = found[_UUID]
        if self._own in self.sources or self._own == self.parent or not any(self._own):
            raise _refused("the subvolume has another one's UUID")
        self.begun = True

    def _check_end(self, _found: Attributes) -> None:
        self.ended = True

    def _check_path(self, found: Attributes) -> None:
        if _PATH_LINK in found:
            _check_target(found[_PATH_LINK])
        _check_inside(found[_PATH])

    def _check_pair(self, found: Attributes) -> None:
        _check_inside(found[_PATH])
        _check_inside(found[_PATH_TO if _PATH_TO in found else _PATH_LINK])

    def _check_node(self, found: Attributes) -> None:
        _check_inside(found[_PATH])
        # An overlay file system marks what was deleted by character devices 0:0, which any user may make (mknod(2)).
        mode = _number(found[_MODE])
        if stat.S_IFMT(mode & 0xFFFF) != stat.S_IFCHR or mode > 0xFFFF or _number(found[_RDEV]) != 0:
            self._node = found[_PATH]

    def _check_xattr(self, found: Attributes) -> None:
        _check_inside(found[_PATH])
        name = found[_XATTR_NAME]
        known = _XATTRS.fullmatch(name) or (self.ids is None and _ROOTS_XATTRS.fullmatch(name))
        if not known or len(name) > _LONGEST_NAME or b"\0" in name:
            raise _refused(f"attribute {_shown(name)} of a file cannot be taken")
        if name == b"security.capability" and _XATTR_DATA in found:
            self._check_capability(found[_XATTR_DATA])

    def _check_capability(self, value: bytes) -> None:
        """Raise unless the file's capabilities count in the container alone (struct vfs_ns_cap_data)."""
        if self.ids is None:
            return
        if len(value) != 24 or value[3] != 3 or _CAPABILITY.unpack_from(value, 20)[0] != self.ids.first:
            raise _refused("a file has capabilities on the host")

    def _check_clone(self, found: Attributes) -> None:
        _check_inside(found[_PATH])
        _check_inside(found[_CLONE_PATH])
        if found[_CLONE_UUID] != self._own and found[_CLONE_UUID] not in self.sources:
            raise _refused("a file is cloned from a volume that does not belong to it")

    def _check_mode(self, found: Attributes) -> None:
        self._check_placed(found[_PATH])
        if _number(found[_MODE]) > 0o7777:
            raise _refused("a mode is out of range")

    def _check_owner(self, found: Attributes) -> None:
        owners = _number(found[_UID]), _number(found[_GID])
        if self._check_placed(found[_PATH]) and owners == (0, 0):
            return
        first, after = (0, _NO_ID) if self.ids is None else (self.ids.first, self.ids.first + self.ids.count)
        if not all(first <= owner < after for owner in owners):
            name = printable(found[_PATH][:200].decode(errors="replace"))
            raise _refused(f"{name} belongs to {owners[0]}:{owners[1]}, which is not in the container's id map")

    def _check_times(self, found: Attributes) -> None:
        self._check_placed(found[_PATH])

    def _check_placed(self, path: bytes) -> bool:
        """Whether the path is of the volume itself or of a note in it, which are ours."""
        if not path or _NOTES.fullmatch(path):
            return True
        _check_inside(path)
        return False


def _check_inside(path: bytes) -> None:
    if len(path) > _LONGEST_PATH:
        raise _refused("a path is too long")
    if not (_INSIDE.fullmatch(path) or _NOTES.fullmatch(path)):
        raise _refused(f"path {_shown(path)!r} is not in the container")


def _check_target(target: bytes) -> None:
    """A symbolic link may name anything, as long as it is a name."""
    if not 0 < len(target) <= _LONGEST_PATH or b"\0" in target:
        raise _refused("a link leads to no name")


def _device(path: bytes) -> InvalidRequest:
    name = _shown(path.removeprefix(b"rootfs/"))
    return InvalidRequest(f"the container holds a device node, which cannot be taken: {name}")


def _number(value: bytes) -> int:
    return int(_NUMBER.unpack(value)[0])


def _shown(name: bytes) -> str:
    return printable(name[:200].decode(errors="replace"))


def _refused(why: str, allowed: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"the btrfs stream is not taken: {why}", allowed=allowed)
