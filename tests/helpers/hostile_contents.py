"""The other half of the hostile archives: sizes, bombs, damage, attributes, and traps for what we write afterwards."""

from __future__ import annotations

import zlib

from tests.helpers import tar_bytes as tar
from tests.helpers.hostile_archives import CAPABILITY, GIB, TIB, Hostile, after, root, unified

_PIECE = 64 * 1024**2


def sizes() -> list[Hostile]:
    """Sizes that are lies, or holes."""
    last = TIB - 512
    data = b"x" * 512
    holes = "too-large: a file in the archive is too large"
    entry = tar.base256(last, 12) + tar.base256(512, 12)
    gnu_map = bytes(41) + entry + bytes(72) + b"\0" + tar.base256(TIB, 12)
    old = {"GNU.sparse.size": str(TIB), "GNU.sparse.numblocks": "1", "GNU.sparse.map": f"{last},512"}
    new = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(TIB)}
    new_map = tar.padded(f"1\n{last}\n512\n".encode()) + data
    odd = {"GNU.sparse.size": "1024", "GNU.sparse.numblocks": "3", "GNU.sparse.map": "512,512,0,512,-5,99"}
    broken = "(invalid|too-large): "
    claim = 7 * GIB
    return [
        Hostile("sparse terabyte, GNU", lambda _: after(tar.gnu("etc/s", tar.SPARSE, data, tail=gnu_map)), "", holes),
        Hostile(
            "sparse terabyte, pax 0.1", lambda _: after(tar.pax(old), tar.member("etc/s", content=data)), "", holes
        ),
        Hostile(
            "sparse terabyte, pax 1.0",
            lambda _: after(tar.pax({**new, "GNU.sparse.name": "etc/s"}), tar.member("x", content=new_map)),
            "",
            holes,
        ),
        Hostile(
            "sparse name with dots",
            lambda out: after(
                tar.pax({**new, "GNU.sparse.name": f"../../../../{out}/evil", "GNU.sparse.realsize": "512"}),
                tar.member("x", content=tar.padded(b"1\n0\n512\n") + data),
            ),
            r"invalid: .*'\.\.' in its name",
            r"invalid: .*Member name contains '\.\.'",
        ),
        Hostile(
            "sparse map that overlaps",
            lambda _: after(tar.pax(odd), tar.member("etc/s", content=data * 2)),
            broken,
            broken,
        ),
        Hostile("exabytes", lambda _: after(tar.header("etc/x", size=tar.base256(2**62, 12))), broken, broken),
        Hostile("a negative size", lambda _: after(tar.header("etc/x", size=tar.base256(-1, 12))), broken, broken),
        Hostile(
            "a size beyond 64 bits", lambda _: after(tar.header("etc/x", size=b"\x80" + b"\xff" * 11)), broken, broken
        ),
        Hostile(
            "a size that is no number", lambda _: after(tar.header("etc/x", size=b"zzzzzzzzzzz\0")), broken, broken
        ),
        Hostile(
            "exabytes by pax", lambda _: after(tar.pax({"size": str(2**63 - 1)}), tar.member("etc/x")), broken, broken
        ),
        Hostile(
            "a negative size by pax", lambda _: after(tar.pax({"size": "-1"}), tar.member("etc/x")), broken, broken
        ),
        Hostile("gigabytes of pax header", lambda _: after(tar.header("x", tar.PAX, size=claim)), broken, broken),
        Hostile(
            "gigabytes of a name",
            lambda _: after(tar.gnu("././@LongLink", tar.LONG_NAME)[:512].replace(b"00000000000", b"77777777777", 1)),
            broken,
            broken,
        ),
        Hostile(
            "100 MB of pax header, squeezed",
            lambda _: tar.zstd(after(tar.pax({"comment": b"x" * 100_000_000}), tar.member("etc/x"))),
        ),
        Hostile(
            "30,000 records of pax",
            lambda _: tar.gz(
                after(tar.pax({f"SCHILY.xattr.user.{n}": b"x" * 100 for n in range(30_000)}), tar.member("etc/x"))
            ),
        ),
    ]


def bombs() -> list[Hostile]:
    """Small files that unpack to gigabytes, or take gigabytes to unpack."""
    limit = "too-large: the archive unpacks to more than"
    damaged = "invalid: the archive (is damaged|cannot be worked on)"
    head = root() + tar.header("etc/zeros", size=4 * GIB)
    zeros = bytes(_PIECE)

    def many(_: str) -> bytes:
        piece = b"".join(tar.header(f"etc/many/{number}", mode=0o644) for number in range(1000))
        return tar.zstd(root()) + tar.zstd(piece * 50) * 200

    def dictionary(_: str) -> bytes:
        content = bytearray(tar.xz(after()))
        size = (content[12] + 1) * 4
        content[16] = 40  # 4 GiB less one byte, see the .xz format's LZMA2 filter
        content[12 + size - 4 : 12 + size] = zlib.crc32(content[12 : 12 + size - 4]).to_bytes(4, "little")
        return bytes(content)

    def window(_: str) -> bytes:
        content = bytearray(tar.zstd(after()))
        content[5] = 21 << 3  # 2 GiB, see RFC 8878, 3.1.1.1.2
        return bytes(content)

    return [
        Hostile("2 GiB of zeros by gzip", lambda _: tar.gz(head) + tar.gz(zeros) * 32, limit, limit),
        Hostile("4 GiB of zeros by xz", lambda _: tar.xz(head) + tar.xz(zeros) * 64, limit, limit),
        Hostile("4 GiB of zeros by zstd", lambda _: tar.zstd(head) + tar.zstd(zeros) * 64, limit, limit),
        Hostile("4 GiB of zeros by bzip2", lambda _: tar.bz(head) + tar.bz(zeros) * 64, limit, limit),
        Hostile("ten million files", many, limit, "too-large: the image has more than"),
        Hostile("gzip in gzip", lambda _: tar.gz(tar.gz(after())), damaged, damaged),
        Hostile("zstd of zeros in xz", lambda _: tar.xz(tar.zstd(zeros) * 100), damaged, damaged),
        Hostile("a dictionary of 4 GiB", dictionary, damaged, damaged),
        Hostile("a window of 2 GiB", window, damaged, damaged),
    ]


def damage() -> list[Hostile]:
    """Archives that end early, late or not at all."""
    damaged = "invalid: the archive (is damaged|cannot be worked on)"
    second = tar.member("l", tar.LINK, target="/etc") + tar.member("l/evil", content=b"evil") + tar.END
    flipped = bytearray(root()[:5120] + after()[5120:])
    flipped[5120 + 149] ^= 1
    return [
        Hostile("nothing", lambda _: b"", "invalid: the file is no tar archive", "invalid: "),
        Hostile("text", lambda _: b"#!/bin/sh\nrm -rf /\n" * 100, "invalid: the file is no tar archive", damaged),
        Hostile("zeros", lambda _: bytes(100_000), "invalid: the file is no tar archive"),
        Hostile("cut in a header", lambda _: root()[: 512 * 3 + 100]),
        Hostile("cut in a file", lambda _: after()[:700_000], damaged, damaged),
        Hostile("cut in gzip", lambda _: tar.gz(after())[:300_000], damaged, damaged),
        Hostile("cut in zstd", lambda _: tar.zstd(after())[:300_000], damaged, damaged),
        Hostile("a header with a wrong sum", lambda _: bytes(flipped), damaged, damaged),
        Hostile("text after the end", lambda _: after() + b"#!/bin/sh\nrm -rf /\n" * 5000),
        Hostile("text after gzip's end", lambda _: tar.gz(after()) + b"#!/bin/sh\nrm -rf /\n" * 5000),
        Hostile("a second archive", lambda _: after() + second * 30),
    ]


def attributes() -> list[Hostile]:
    """Owners, times, modes and attributes that mean power, or nothing at all."""
    far = "invalid: .*(Cannot change ownership|is out of)"

    def marked(**values: str | bytes) -> bytes:
        keys = {name.replace("__", "."): value for name, value in values.items()}
        return after(tar.pax(keys), tar.member("bin/marked", content=b"#!/bin/sh\n"))

    xattr = "SCHILY__xattr__"
    acl = "user::rwx,user:0:rwx,user:4294967295:rwx,group::r-x,mask::rwx,other::rwx"
    return [
        Hostile("setuid root", lambda _: after(tar.member("bin/marked", content=b"#!/bin/sh\n", mode=0o6777))),
        Hostile("a capability", lambda _: marked(**{f"{xattr}security__capability": CAPABILITY})),
        Hostile("a broken capability", lambda _: marked(**{f"{xattr}security__capability": b"\xff" * 7})),
        Hostile("trusted attributes", lambda _: marked(**{f"{xattr}trusted__overlay__opaque": "y"})),
        Hostile(
            "a label of SELinux", lambda _: marked(**{f"{xattr}security__selinux": "system_u:object_r:shadow_t:s0"})
        ),
        Hostile("an attribute of 1 MB", lambda _: marked(**{f"{xattr}user__big": b"x" * 1_000_000})),
        Hostile("access lists", lambda _: marked(SCHILY__acl__access=acl, SCHILY__acl__default=acl)),
        Hostile("access lists of nonsense", lambda _: marked(SCHILY__acl__access="\x1b[2J,,;user:" + "9" * 5000)),
        Hostile("owner 4294967295", lambda _: marked(uid=str(2**32 - 1), gid=str(2**32 - 1))),
        Hostile("owner outside the map", lambda _: after(tar.member("etc/x", owner=1_000_000)), "", far),
        Hostile("a negative owner", lambda _: after(tar.member("etc/x", owner=tar.base256(-1, 8))), far, far),
        Hostile("an owner beyond 64 bits", lambda _: marked(uid="9" * 40), far, far),
        Hostile("time far ahead", lambda _: marked(mtime="99999999999999999")),
        Hostile("time beyond 64 bits", lambda _: after(tar.member("etc/x", modified=b"\x80" + b"\xff" * 11)), far, far),
        Hostile("time before all", lambda _: after(tar.member("etc/x", modified=tar.base256(-(2**62), 12)))),
        Hostile("modes of all bits", lambda _: after(tar.member("etc/x", mode=b"7777777\0"))),
        Hostile("the top closed to all", lambda _: after(tar.member("./", tar.DIRECTORY, mode=0))),
        Hostile("the top is another's", lambda _: after(tar.member("./", tar.DIRECTORY, mode=0o7777, owner=65534))),
    ]


def traps() -> list[Hostile]:
    """Links and pipes where we, LXC or the kernel write or read after the unpacking."""

    def link(name: str, out: str) -> bytes:
        return after(tar.member(name, tar.LINK, target=f"/{out}"), without=(name,))

    def pipe(name: str) -> bytes:
        return after(tar.member(name, tar.FIFO), without=(name,))

    places = ("etc", "dev", "proc", "sys", "var", "sbin", "run", "etc/init.d")
    files = ("etc/hostname", "etc/machine-id", "etc/resolv.conf", "etc/mtab", "sbin/init", "var/lib/dbus/machine-id")
    cases = [Hostile(f"/{place} is a link", lambda out, at=place: link(at, out)) for place in places]  # type: ignore[misc]
    cases += [Hostile(f"/{file} is a link", lambda out, at=file: link(at, f"{out}/precious")) for file in files]  # type: ignore[misc]
    cases += [Hostile(f"/{file} is a pipe", lambda _, at=file: pipe(at)) for file in files[:2]]  # type: ignore[misc]
    return [
        *cases,
        Hostile("/etc/hostname is a directory", lambda _: after(tar.member("etc/hostname/x/y", content=b"x"))),
        Hostile("/proc is a file", lambda _: after(tar.member("proc", content=b"x"), without=("proc",))),
        Hostile(
            "/dev/pts is a link",
            lambda out: after(
                tar.member("devices/pts", tar.LINK, target=f"/{out}"),
                tar.member("dev", tar.LINK, target="devices"),
                without=("dev",),
            ),
        ),
        Hostile(
            "hostname by two names",
            lambda _: after(tar.member("etc/x", content=b"x"), tar.member("etc/hostname", tar.HARD, target="etc/x")),
        ),
        Hostile(
            "rootfs/etc of the host",
            lambda out: unified(tar.member("rootfs/etc/hostname", tar.LINK, target=f"/{out}/precious")),
            layout="unified",
        ),
    ]
