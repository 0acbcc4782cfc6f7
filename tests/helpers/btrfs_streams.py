"""btrfs send streams written by hand, honest and hostile (the format is that of fs/btrfs/send.h, version 1)."""

from __future__ import annotations

import struct
from functools import cache

FIRST = 1_000_000
OWN = b"\1" * 16
PARENT = b"\2" * 16
FOREIGN = b"\3" * 16
STREAM = "round-0"

SUBVOL, SNAPSHOT, MKFILE, MKDIR, MKNOD, MKFIFO, MKSOCK, SYMLINK, RENAME, LINK, UNLINK = range(1, 12)
RMDIR, SET_XATTR, REMOVE_XATTR, WRITE, CLONE, TRUNCATE, CHMOD, CHOWN, UTIMES, END, UPDATE_EXTENT = range(12, 23)
UUID, CTRANSID, INO, SIZE, MODE, UID, GID, RDEV, CTIME, MTIME, ATIME, OTIME = range(1, 13)
XATTR_NAME, XATTR_DATA, PATH, PATH_TO, PATH_LINK, OFFSET, DATA = range(13, 20)
CLONE_UUID, CLONE_CTRANSID, CLONE_PATH, CLONE_OFFSET, CLONE_LEN = range(20, 25)


@cache
def _table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


def checksum(data: bytes) -> int:
    """CRC-32C as the kernel's crc32c(0, …) has it."""
    crc, table = 0, _table()
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc


def attribute(kind: int, value: bytes | int) -> bytes:
    """One attribute; a number is 64 bits wide."""
    content = struct.pack("<Q", value) if isinstance(value, int) else value
    return struct.pack("<HH", kind, len(content)) + content


def command(kind: int, *attributes: tuple[int, bytes | int] | bytes, length: int | None = None) -> bytes:
    """One command; `length` is a lie about how long it is."""
    body = b"".join(one if isinstance(one, bytes) else attribute(*one) for one in attributes)
    claimed = len(body) if length is None else length
    sealed = checksum(struct.pack("<IHI", claimed, kind, 0) + body)
    return struct.pack("<IHI", claimed, kind, sealed) + body


def opening(version: int = 1, magic: bytes = b"btrfs-stream\0") -> bytes:
    """What a stream begins with."""
    return struct.pack("<13sI", magic, version)


def subvolume(name: str = STREAM, uuid: bytes = OWN) -> bytes:
    """The command that makes the subvolume."""
    return command(SUBVOL, (PATH, name.encode()), (UUID, uuid), (CTRANSID, 7))


def snapshot(parent: bytes = PARENT, name: str = STREAM) -> bytes:
    """The command that makes it as a snapshot of another one."""
    base = ((CLONE_UUID, parent), (CLONE_CTRANSID, 7))
    return command(SNAPSHOT, (PATH, name.encode()), (UUID, OWN), (CTRANSID, 8), *base)


def stream(*commands: bytes, made: bytes | None = None) -> bytes:
    """A whole stream of one subvolume."""
    return opening() + (made or subvolume()) + b"".join(commands) + command(END)


def owned(path: str, owner: int = FIRST) -> bytes:
    """Give a path to a user."""
    return command(CHOWN, (PATH, path.encode()), (UID, owner), (GID, owner))


def root() -> bytes:
    """The container's root directory."""
    made = command(MKDIR, (PATH, b"o257-7-0"), (INO, 257))
    return made + command(RENAME, (PATH, b"o257-7-0"), (PATH_TO, b"rootfs")) + owned("rootfs")


def file(path: str = "rootfs/file", content: bytes = b"content", owner: int = FIRST) -> bytes:
    """A file with content."""
    name = path.encode()
    return (
        command(MKFILE, (PATH, b"o258-7-0"), (INO, 258))
        + command(RENAME, (PATH, b"o258-7-0"), (PATH_TO, name))
        + command(WRITE, (PATH, name), (OFFSET, 0), (DATA, content))
        + owned(path, owner)
    )


def link(path: str, target: bytes) -> bytes:
    """A symbolic link."""
    return command(SYMLINK, (PATH, path.encode()), (INO, 259), (PATH_LINK, target)) + owned(path)


def on(kind: int, path: bytes, *more: tuple[int, bytes | int]) -> bytes:
    """A command on a path."""
    return command(kind, (PATH, path), *more)


def cloned(uuid: bytes, path: bytes = b"rootfs/file", source: bytes = b"rootfs/file") -> bytes:
    """Blocks of a file taken from another one."""
    place = ((OFFSET, 0), (CLONE_LEN, 4096), (PATH, path), (CLONE_UUID, uuid), (CLONE_CTRANSID, 7))
    return command(CLONE, *place, (CLONE_PATH, source), (CLONE_OFFSET, 0))


def capability(root_id: int | None) -> bytes:
    """A file's capability cap_setuid: of the host (None), or of the containers whose root is that id."""
    rights = struct.pack("<IIII", 1 << 7, 0, 0, 0)
    if root_id is None:
        return struct.pack("<I", 0x02000001) + rights
    return struct.pack("<I", 0x03000001) + rights + struct.pack("<I", root_id)


HONEST = stream(
    root(),
    file(),
    link("rootfs/link", b"/etc/../../anything"),
    on(MKNOD, b"rootfs/whiteout", (INO, 260), (RDEV, 0), (MODE, 0o020644)),
    owned("rootfs/whiteout"),
    on(SET_XATTR, b"rootfs/file", (XATTR_NAME, b"user.note"), (XATTR_DATA, b"\0x")),
    on(SET_XATTR, b"rootfs/file", (XATTR_NAME, b"security.capability"), (XATTR_DATA, capability(FIRST))),
    on(CHMOD, b"rootfs/file", (MODE, 0o4755)),
    on(LINK, b"rootfs/hard", (PATH_LINK, b"rootfs/file")),
    on(MKFIFO, b"rootfs/..fifo\n", (INO, 261), (RDEV, 0), (MODE, 0o010644)),
    owned("rootfs/..fifo\n", FIRST + 65535),
)

HOSTILE: dict[str, bytes] = {
    "no stream": b"nonsense" * 100,
    "nothing": b"",
    "another version": opening(2) + subvolume() + command(END),
    "a version far off": opening(2**32 - 1) + subvolume() + command(END),
    "another name": stream(made=subvolume("round-1")),
    "a name that leads out": stream(made=subvolume("../round-0")),
    "an absolute name": stream(made=subvolume("/round-0")),
    "no UUID": stream(made=subvolume(uuid=bytes(16))),
    "no subvolume": opening() + root() + command(END),
    "a foreign parent": stream(made=snapshot(FOREIGN)),
    "two subvolumes": stream(root(), subvolume()),
    "a second stream": stream(root()) + stream(root()),
    "more after the end": stream(root()) + root(),
    "bytes after the end": stream(root()) + b"\0",
    "truncated": stream(root(), file())[:-4],
    "no end": opening() + subvolume() + root(),
    "a command that claims to be longer": opening() + subvolume() + command(END, length=100),
    "a command that claims to be huge": opening() + subvolume() + command(WRITE, length=2**32 - 1) + bytes(1000),
    "an attribute longer than its command": stream(command(UNLINK, struct.pack("<HH", PATH, 60_000) + b"rootfs/x")),
    "half an attribute": stream(command(UNLINK, struct.pack("<HB", PATH, 1))),
    "a number of three bytes": stream(root(), on(CHMOD, b"rootfs", (MODE, b"\0\0\0"))),
    "a UUID of three bytes": opening() + command(SUBVOL, (PATH, STREAM.encode()), (UUID, b"\1\1\1"), (CTRANSID, 7)),
    "a path twice": stream(root(), command(UNLINK, (PATH, b"rootfs/x"), (PATH, b"../x"))),
    "no path": stream(command(UNLINK)),
    "an attribute of another command": stream(root(), on(UNLINK, b"rootfs/x", (DATA, b"x"))),
    "an unknown command": stream(command(26, (PATH, b"rootfs/x"))),
    "a command of version 2": stream(command(23, (PATH, b"rootfs/x"))),
    "no command": stream(command(0)),
    "an extent that is not sent": stream(root(), on(UPDATE_EXTENT, b"rootfs/x", (OFFSET, 0), (SIZE, 1))),
    "two dots": stream(root(), on(MKDIR, b"rootfs/../../x", (INO, 300))),
    "two dots at the end": stream(root(), on(RMDIR, b"rootfs/..")),
    "a dot": stream(root(), on(RMDIR, b"rootfs/./x")),
    "an absolute path": stream(on(MKFILE, b"/etc/cron.d/x", (INO, 300))),
    "an empty path": stream(on(UNLINK, b"")),
    "an empty component": stream(root(), on(UNLINK, b"rootfs//x")),
    "a zero in a path": stream(root(), on(UNLINK, b"rootfs/x\0y")),
    "a huge path": stream(root(), on(MKFILE, b"rootfs/" + b"x/" * 3000 + b"x", (INO, 300))),
    "a long name": stream(root(), on(MKFILE, b"rootfs/" + b"x" * 256, (INO, 300))),
    "another top": stream(on(MKDIR, b"elsewhere", (INO, 300))),
    "a mark of ours": stream(on(MKFILE, b"round-0.whole", (INO, 300))),
    "renamed out": stream(root(), file(), on(RENAME, b"rootfs/file", (PATH_TO, b"../../x"))),
    "renamed to another top": stream(root(), file(), on(RENAME, b"rootfs/file", (PATH_TO, b"elsewhere"))),
    "linked from outside": stream(root(), on(LINK, b"rootfs/x", (PATH_LINK, b"/etc/shadow"))),
    "a link to nothing": stream(root(), on(SYMLINK, b"rootfs/x", (INO, 300), (PATH_LINK, b""))),
    "a disk": stream(root(), on(MKNOD, b"rootfs/disk", (INO, 300), (RDEV, 0x700), (MODE, 0o060600))),
    "a disk at the end": opening() + subvolume() + on(MKNOD, b"o9-9-9", (INO, 9), (RDEV, 0x700), (MODE, 0o060600)),
    "memory": stream(root(), on(MKNOD, b"rootfs/mem", (INO, 300), (RDEV, 0x101), (MODE, 0o020600))),
    "a node of no kind": stream(root(), on(MKNOD, b"rootfs/mem", (INO, 300), (RDEV, 0), (MODE, 0o600))),
    "the host's root": stream(root(), owned("rootfs", 0)),
    "a user of the host": stream(root(), owned("rootfs", 1000)),
    "the id after the map": stream(root(), owned("rootfs", FIRST + 65536)),
    "no id": stream(root(), owned("rootfs", 2**32 - 1)),
    "an id beyond 32 bits": stream(root(), owned("rootfs", 2**32 + FIRST)),
    "a mode beyond all bits": stream(root(), on(CHMOD, b"rootfs", (MODE, 0o104755))),
    "a foreign clone": stream(root(), file(), cloned(FOREIGN)),
    "a clone of a path outside": stream(root(), file(), cloned(OWN, source=b"../x/rootfs/file")),
    "a capability on the host": stream(
        root(),
        file(),
        on(SET_XATTR, b"rootfs/file", (XATTR_NAME, b"security.capability"), (XATTR_DATA, capability(None))),
    ),
    "a capability in another container": stream(
        root(), file(), on(SET_XATTR, b"rootfs/file", (XATTR_NAME, b"security.capability"), (XATTR_DATA, capability(0)))
    ),
    "an attribute of root's": stream(
        root(), file(), on(SET_XATTR, b"rootfs/file", (XATTR_NAME, b"trusted.overlay.opaque"), (XATTR_DATA, b"y"))
    ),
    "an attribute of a security module": stream(
        root(), file(), on(SET_XATTR, b"rootfs/file", (XATTR_NAME, b"security.ima"), (XATTR_DATA, b"y"))
    ),
    "an attribute of the volume": stream(on(SET_XATTR, b"", (XATTR_NAME, b"user.x"), (XATTR_DATA, b"y"))),
}
"""What the guard must refuse, by what it is."""

PAST_THE_GUARD: dict[str, bytes] = {
    "a file left to the host's root": stream(
        root(), on(MKFILE, b"rootfs/own", (INO, 300)), on(CHMOD, b"rootfs/own", (MODE, 0o4755))
    ),
    "one beside the root, moved in through a link": stream(
        root(),
        on(MKFILE, b"image.json", (INO, 300)),
        on(CHMOD, b"image.json", (MODE, 0o4755)),
        link("rootfs/up", b".."),
        on(RENAME, b"rootfs/up/image.json", (PATH_TO, b"rootfs/own")),
    ),
    "one written through an absolute link": stream(
        root(), link("rootfs/out", b"/usr/bin"), on(MKFILE, b"rootfs/out/evil", (INO, 300))
    ),
    "the password file through a link": stream(
        root(), link("rootfs/out", b"/etc/passwd"), on(WRITE, b"rootfs/out", (OFFSET, 0), (DATA, b"evil"))
    ),
    "the mark beside, through a link": stream(
        root(), link("rootfs/out", b"/data/../round-0.whole"), on(WRITE, b"rootfs/out", (OFFSET, 0), (DATA, b"evil"))
    ),
    "a root's program beside the volume, through a link": stream(
        root(),
        link("rootfs/out", b"/data"),
        on(MKFILE, b"rootfs/out/evil", (INO, 300)),
        on(CHMOD, b"rootfs/out/evil", (MODE, 0o4755)),
    ),
    "the place itself opened, through a link": stream(
        root(),
        link("rootfs/out", b"/data"),
        on(CHMOD, b"rootfs/out", (MODE, 0o777)),
        on(MKDIR, b"rootfs/out/sub", (INO, 301)),
    ),
    "a wrong checksum": HONEST.replace(b"content", b"CONTENT"),
    "a file where a directory should be": stream(root(), file(), on(MKDIR, b"rootfs/file/below", (INO, 300))),
    "a clone of what is not there": stream(root(), file(), cloned(OWN, source=b"rootfs/none")),
}
"""What the guard cannot know, and `btrfs receive`, the sandbox or the file system's own tree refuses."""
