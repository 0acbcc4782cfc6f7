"""Hostile archives in LXD's format, and the whole corpus."""

from __future__ import annotations

from collections.abc import Callable

from tests.helpers import hostile_archives as archives
from tests.helpers import hostile_contents as contents
from tests.helpers import tar_bytes as tar
from tests.helpers.hostile_archives import METADATA, Hostile, tops, unified


def tops_of_images() -> list[Hostile]:
    """LXD's format with something else where rootfs, metadata.yaml or LXD's own files belong."""
    none = "invalid: the image('s rootfs is no directory| has no rootfs)|invalid: the archive cannot"
    plain = "invalid: (rootfs in the archive is not a directory|the archive has metadata.yaml but no)"
    etc = tar.member("rootfs/etc/", tar.DIRECTORY)
    templates = METADATA + b"templates:\n  /etc/shadow: {when: [create], template: ../../../../etc/shadow}\n"

    def link(name: str, out: str) -> bytes:
        return tar.member(name, tar.LINK, target=f"/{out}")

    def yaml(kind: bytes) -> Callable[[str], bytes]:
        inside = tar.member("rootfs/", tar.DIRECTORY) + etc + tar.END
        return lambda out: tar.member("metadata.yaml", kind, target=f"/{out}/precious") + inside

    cases = [
        Hostile("rootfs is a link", lambda out: tops(link("rootfs", out), etc), plain, none),
        Hostile("rootfs is a link to /", lambda _: tops(tar.member("rootfs", tar.LINK, target="/"), etc), plain, none),
        Hostile("rootfs is a file", lambda _: tops(tar.member("rootfs", content=b"x")), plain, none),
        Hostile("rootfs is a hard link", lambda _: tops(tar.member("rootfs", tar.HARD, target="/etc")), plain, none),
        Hostile("rootfs is a pipe", lambda _: tops(tar.member("rootfs", tar.FIFO)), plain, none),
        Hostile("rootfs is a device", lambda _: tops(tar.member("rootfs", tar.CHAR)), plain, none),
        Hostile(
            "rootfs becomes a link",
            lambda out: tops(tar.member("rootfs/", tar.DIRECTORY), link("rootfs", out), etc),
            plain,
            none,
        ),
        Hostile("rootfs is not there", lambda _: tops(tar.member("etc", tar.DIRECTORY)), plain, none),
        Hostile("metadata.yaml is a link", yaml(tar.LINK), "invalid: metadata.yaml"),
        Hostile("metadata.yaml is a hard link", yaml(tar.HARD), "invalid: ", "invalid: "),
        Hostile("metadata.yaml is a pipe", yaml(tar.FIFO), "invalid: metadata.yaml"),
        Hostile("metadata.yaml is a device", yaml(tar.CHAR), "invalid: metadata.yaml", "invalid: .*mknod"),
        Hostile(
            "templates that climb out",
            lambda out: unified(link("templates", out), tar.member("templates/evil.tpl"), metadata=templates),
            "",
            "invalid: .*templates/evil.tpl",
        ),
        Hostile("templates of the host", lambda _: unified(tar.member("templates/x.tpl"), metadata=templates)),
        Hostile(
            "exec-output is a link", lambda out: unified(link("exec-output", out), link("rootfs/exec-output", out))
        ),
        Hostile(
            "files of our own",
            lambda out: unified(*(link(x, out) for x in ("image.json", "incomplete", "backup.yaml"))),
        ),
    ]
    bad = {
        "aliases": b"a: &a [x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\n" + METADATA,
        "tags": b"architecture: !!python/object/apply:os.system ['touch /tmp/evil']\n",
        "a giant": METADATA + b"#" * 8_000_000,
        "100,000 brackets": b"architecture: x86_64\nproperties: " + b"[" * 50_000,
        "control characters": b'architecture: x86_64\nproperties: {os: "\\e[2J\\n"}\n',
    }
    cases += [
        Hostile(
            f"metadata.yaml: {name}", lambda _, text=text: unified(metadata=text), "(invalid|too-large): metadata.yaml"
        )  # type: ignore[misc]
        for name, text in bad.items()
    ]
    return [Hostile(case.name, case.build, case.refused, case.fails, "unified") for case in cases]


def all_archives() -> list[Hostile]:
    """The whole corpus."""
    members = (archives.names(), archives.links(), archives.kinds(), tops_of_images())
    rest = (contents.sizes(), contents.bombs(), contents.damage(), contents.attributes(), contents.traps())
    return [case for group in (*members, *rest) for case in group]
