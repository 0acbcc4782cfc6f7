"""Image archives that attack whoever reads or unpacks them: each has a name, is small, and is always made alike."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tests.helpers import tar_bytes as tar
from tests.helpers.busybox import busybox_archive

GIB = 1024**3
TIB = 1024**4
METADATA = b"architecture: x86_64\ncreation_date: 1458040200\nproperties: {os: hostile}\n"
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
"""cap_net_admin, as capabilities(7) keeps it in a file."""


@dataclass(frozen=True)
class Hostile:
    """One archive. `build` gets the path of a directory on the host that is to stay as it is, without its first slash.

    `refused` is what the controller says at the import and `fails` what the node says, as a pattern of `code: text`;
    empty where it is taken.
    """

    name: str
    build: Callable[[str], bytes]
    refused: str = ""
    fails: str = ""
    layout: str = "rootfs"


@cache
def root(*without: str) -> bytes:
    """The members of a root file system that runs, without those below some paths."""
    output = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(busybox_archive())) as source,
        tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as made,
    ):
        for entry in source:
            if not any(entry.name == path or entry.name.startswith(f"{path}/") for path in without):
                made.addfile(entry, source.extractfile(entry) if entry.isreg() else None)
        end = output.tell()
    return output.getvalue()[:end]


def after(*members: bytes, without: tuple[str, ...] = ()) -> bytes:
    """A root that runs, then the members."""
    return root(*without) + b"".join(members) + tar.END


def unified(*members: bytes, metadata: bytes = METADATA) -> bytes:
    """LXD's format with a small root, then the members."""
    top = tar.member("metadata.yaml", content=metadata) + tar.member("rootfs/", tar.DIRECTORY)
    inside = tar.member("rootfs/etc/", tar.DIRECTORY) + tar.member("rootfs/etc/passwd", content=b"root:x:0:0::/:\n")
    return top + inside + b"".join(members) + tar.END


def tops(*members: bytes) -> bytes:
    """metadata.yaml, then the members, which make rootfs into something."""
    return tar.member("metadata.yaml", content=METADATA) + b"".join(members) + tar.END


def names() -> list[Hostile]:
    """Names that lead elsewhere, or mean something to whoever prints, parses or makes them."""
    up = "../" * 12
    evil = b"evil"
    dots = (r"invalid: .*'\.\.' in its name", r"invalid: .*Member name contains '\.\.'")
    options = ("--checkpoint-action=exec=touch /data/x", "--to-command=sh", "-I", "--use-compress-program=sh")

    def deep(_: str) -> bytes:
        steps = "d/" * 450
        links = [tar.gnu("././@LongLink", tar.LONG_LINK, steps.encode()) for _ in range(4)]
        places = ["l", "l/l", "l/l/l", "l/l/l/l"]
        made = [tar.gnu("././@LongLink", tar.LONG_NAME, (steps + "\0").encode()) + tar.gnu("d", tar.DIRECTORY)]
        for link, place in zip(links, places, strict=True):
            inner = f"{place}/{steps}\0".encode()
            made.append(link + tar.gnu(place, tar.LINK))
            made.append(tar.gnu("././@LongLink", tar.LONG_NAME, inner) + tar.gnu("d", tar.DIRECTORY))
        return after(*made)

    return [
        Hostile("absolute path", lambda out: after(tar.member(f"/{out}/evil", content=evil))),
        Hostile("dots at the beginning", lambda out: after(tar.member(f"{up}{out}/evil", content=evil)), *dots),
        Hostile("dots in the middle", lambda out: after(tar.member(f"etc/{up}{out}/evil", content=evil)), *dots),
        Hostile("dots at the end", lambda _: after(tar.member("etc/..", tar.DIRECTORY, mode=0)), *dots),
        Hostile("dots in a prefix", lambda out: after(tar.member("evil", tail=f"{up}{out}".encode())), *dots),
        Hostile("dots in a pax path", lambda out: after(tar.pax({"path": f"{up}{out}/evil"}), tar.member("x")), *dots),
        Hostile(
            "absolute pax path", lambda out: after(tar.pax({"path": f"/{out}/evil"}), tar.member("x", content=evil))
        ),
        Hostile(
            "dots in a long name",
            lambda out: after(
                tar.gnu("././@LongLink", tar.LONG_NAME, f"{up}{out}/evil\0".encode()), tar.gnu("x", content=evil)
            ),
            *dots,
        ),
        Hostile(
            "pax path of nothing",
            lambda _: after(tar.pax({"path": ""}), tar.member("x", content=evil)),
            "",
            "invalid: .*File exists",
        ),
        Hostile("pax path for all", lambda _: after(tar.pax({"path": "sbin/init"}, tar.PAX_GLOBAL), tar.member("x"))),
        Hostile("options as names", lambda _: after(*(tar.member(name, content=evil) for name in options))),
        Hostile("host names as names", lambda _: after(tar.member("localhost:x"), tar.member("root@localhost:/x"))),
        Hostile(
            "line breaks", lambda _: after(tar.member("etc/a\nrootfs/\nb"), tar.member("\n"), tar.member("etc/\r"))
        ),
        Hostile("terminal sequences", lambda _: after(tar.member("etc/\x1b[2J\x1b]0;evil\x07\x9b"))),
        Hostile("not UTF-8", lambda _: after(tar.member(b"etc/\xff\xfe\xc3\x28"), tar.member(b"\xed\xa0\x80"))),
        Hostile("right to left", lambda _: after(tar.member("etc/\u202egnp.exe"), tar.member("etc/\u2028x"))),
        Hostile(
            "a name of 8 KiB",
            lambda _: after(tar.gnu("././@LongLink", tar.LONG_NAME, b"etc/" + b"d/" * 4096), tar.gnu("x")),
            "invalid: .*name in the archive is too long",
            "invalid: .*File name too long",
        ),
        Hostile(
            "a part of 300 bytes",
            lambda _: after(tar.pax({"path": "etc/" + "n" * 300}), tar.member("x")),
            "",
            "invalid: .*File name too long",
        ),
        Hostile(
            "100,000 directories in one name",
            lambda _: after(tar.gnu("././@LongLink", tar.LONG_NAME, b"d/" * 100_000), tar.gnu("x")),
            "invalid: .*name in the archive is too long",
            "invalid: .*File name too long",
        ),
        Hostile("2,250 directories by links", deep),
        Hostile("every entry twice", lambda _: root() + after()),
    ]


def links() -> list[Hostile]:
    """Links to the host's files, and files through them."""
    up = "../" * 12
    evil = b"evil"
    none = "invalid: .*(No such file|Cannot hard link|Cannot open|cross-device)"

    def through(target: str) -> bytes:
        return after(tar.member("l", tar.LINK, target=target), tar.member("l/evil", content=evil))

    def hard(target: str | bytes, *before: bytes) -> bytes:
        return after(*before, tar.member("h", tar.HARD, target=target), tar.member("h", content=evil))

    return [
        Hostile("file through a link", lambda out: through(f"/{out}"), "", "invalid: .*l/evil"),
        Hostile("file through a relative link", lambda out: through(up + out), "", "invalid: .*l/evil"),
        Hostile("file through /proc", lambda out: through(f"/proc/self/root/{out}"), "", "invalid: .*l/evil"),
        Hostile("file through /proc/1", lambda out: through(f"/proc/1/root/{out}"), "", "invalid: .*l/evil"),
        Hostile(
            "file through a chain of links",
            lambda out: after(
                tar.member("one", tar.LINK, target="."),
                tar.member("one/two", tar.LINK, target=".."),
                tar.member(f"two/../../{out}/evil", content=evil),
            ),
            r"invalid: .*'\.\.' in its name",
            r"invalid: .*Member name contains '\.\.'",
        ),
        Hostile("link over the top", lambda out: after(tar.member("./", tar.LINK, target=f"/{out}")), "", "invalid: "),
        Hostile(
            "a directory becomes a link",
            lambda out: after(
                tar.member("d", tar.DIRECTORY),
                tar.member("d", tar.LINK, target=f"/{out}"),
                tar.member("d/evil", content=evil),
            ),
            "",
            "invalid: .*d/evil",
        ),
        Hostile(
            "a link becomes a directory",
            lambda out: after(
                tar.member("d", tar.LINK, target=f"/{out}"),
                tar.member("d", tar.DIRECTORY, mode=0o777),
                tar.member("d/evil", content=evil),
            ),
            "",
            "(invalid: .*Cannot unlink.*)?$",  # where the directory got the inode of what stood for the link
        ),
        Hostile("hard link to /etc/passwd", lambda _: hard("/etc/passwd")),
        Hostile("hard link to /etc/shadow by dots", lambda _: hard(f"{up}etc/shadow")),
        Hostile("hard link to a program", lambda _: hard("/usr/bin/tar"), "", none),
        Hostile("hard link to the host", lambda out: hard(f"/{out}/precious"), "", none),
        Hostile("hard link by pax", lambda out: hard("x", tar.pax({"linkpath": f"{up}{out}/precious"})), "", none),
        Hostile(
            "hard link to a link",
            lambda out: after(
                tar.member("s", tar.LINK, target=f"/{out}/precious"),
                tar.member("h", tar.HARD, target="s"),
                tar.member("h", content=evil),
            ),
        ),
        Hostile("hard link to itself", lambda _: after(tar.member("h", tar.HARD, target="h")), "", "invalid: .*h"),
        Hostile(
            "links in a circle",
            lambda _: after(
                tar.member("one", tar.LINK, target="two"),
                tar.member("two", tar.LINK, target="one"),
                tar.member("one/evil", content=evil),
            ),
            "",
            "invalid: .*one/evil",
        ),
        Hostile(
            "a link's target of 8 KiB",
            lambda _: after(tar.gnu("././@LongLink", tar.LONG_LINK, b"d/" * 4096), tar.gnu("l", tar.LINK)),
            "",
            "invalid: .*File name too long",
        ),
        Hostile("a link to nothing", lambda _: after(tar.member("l", tar.LINK)), "", "invalid: .*l"),
    ]


def kinds() -> list[Hostile]:
    """Members that are neither files, directories nor links, or are it in another sense."""
    denied = "invalid: .*Cannot mknod: Operation not permitted"
    dump = b"Npasswd\0R/data/etc/passwd\0T/data/evil\0X/data/sbin\0Yshadow\0\0"
    odd = (".//dev/zero", "././dev/zero", "dev//zero", "/dev/zero")
    return [
        Hostile("character device", lambda _: after(tar.member("zero", tar.CHAR, device=(1, 5))), "", denied),
        Hostile("block device", lambda _: after(tar.member("disk", tar.BLOCK_DEVICE, device=(8, 0))), "", denied),
        Hostile(
            "devices below /dev", lambda _: after(tar.member("dev/mem", tar.CHAR), tar.member("./dev/zero", tar.CHAR))
        ),
        Hostile(
            "devices below /dev, spelled oddly", lambda _: after(*(tar.member(x, tar.CHAR) for x in odd)), "", denied
        ),
        Hostile("init is a pipe", lambda _: after(tar.member("sbin/init", tar.FIFO), without=("sbin/init",))),
        Hostile(
            "init is a device", lambda _: after(tar.member("sbin/init", tar.CHAR), without=("sbin/init",)), "", denied
        ),
        Hostile("an unknown kind", lambda _: after(tar.member("etc/odd", b"Z", b"evil"))),
        Hostile(
            "continued from another volume",
            lambda _: after(tar.gnu("etc/x", tar.CONTINUED, b"x" * 512)),
            "",
            "invalid: ",
        ),
        Hostile("orders to rename and delete", lambda _: after(tar.gnu("etc/", tar.DUMP_DIRECTORY, dump))),
        Hostile("a volume's name", lambda _: tar.gnu("evil; touch x", b"V") + after()),
    ]
