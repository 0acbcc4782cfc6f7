"""Runs a program where it can harm nothing but one directory; `python -I -S sandbox.py` with the arguments of `main`.

The program sees the host's programs and libraries read-only, the directory as `/data`, and nothing else: no other
file, no network. For an unprivileged container it also has that container's ids, so it can make no device node.
Stands alone: it imports nothing of the project, and starts in a fraction of its time.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path

NEWNS, NEWIPC, NEWUSER, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY, ATTR_NODEV = 442, -100, 0x8000, 1, 4
MEMORY = 1024**3
"""Address space in bytes: what a hostile archive can make a program take."""
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
PROGRAMS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
ROOT = Path("/tmp")  # noqa: S108 -- covered by a file system of our own, in our own mount namespace
LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError when a call of the C library failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: str, target: Path, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    words = [word.encode() if word is not None else None for word in (kind, data)]
    check(LIBC.mount(source.encode(), os.fsencode(target), words[0], flags, words[1]), f"mount {target}")


def read_only(target: Path, flags: int) -> None:
    """Make a mount read-only, with AT_RECURSIVE all below it too."""
    restrict(target, ATTR_RDONLY, flags)


def restrict(target: Path, what: int, flags: int) -> None:
    """Take away what can be done in a mount (mount_setattr(2))."""
    attributes = struct.pack("=4Q", what, 0, 0, 0)
    arguments = (AT_FDCWD, os.fsencode(target), flags, attributes, len(attributes))
    check(LIBC.syscall(MOUNT_SETATTR, *arguments), f"mount_setattr {target}")


def enter_namespaces(first: int, count: int) -> None:
    """New namespaces; with `first` 0 or more a user namespace too, in which 0 to `count` are the ids from there on."""
    own = NEWNS | NEWIPC | NEWNET
    if first < 0:
        check(LIBC.unshare(own), "unshare")
        return
    ready, tell = os.pipe()
    process = os.getpid()
    helper = os.fork()
    if helper == 0:
        # Only a process outside may write the map.
        os.close(tell)
        alive = os.read(ready, 1)
        for kind in ("uid_map", "gid_map") if alive else ():
            Path(f"/proc/{process}/{kind}").write_text(f"0 {first} {count}\n")
        os._exit(0)
    check(LIBC.unshare(own | NEWUSER), "unshare")
    os.write(tell, b"1")
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError(0, "the id map cannot be written")
    os.close(ready)
    os.close(tell)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def build_root(directory: str, writable: bool) -> None:
    """Make the small world around `/data`, and make it the root."""
    mount("none", Path("/"), None, MS_REC | MS_PRIVATE)
    # Opened before its path may be covered.
    content = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    mount("sandbox", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for name in PROGRAMS:
        there, here = Path("/", name), ROOT / name
        if there.is_symlink():
            here.symlink_to(there.readlink())
        elif there.is_dir():
            here.mkdir()
            mount(str(there), here, None, MS_BIND | MS_REC)
            read_only(here, AT_RECURSIVE)
    data = ROOT / "data"
    data.mkdir()
    mount(f"/proc/self/fd/{content}", data, None, MS_BIND)
    restrict(data, ATTR_NODEV if writable else ATTR_NODEV | ATTR_RDONLY, 0)
    read_only(ROOT, 0)
    os.chroot(ROOT)
    os.chdir("/data")


def main(first: str, count: str, directory: str, mode: str, largest: str, program: str, *arguments: str) -> None:
    """`mode` of the directory is `rw` or `ro`; `largest` is the greatest size of a file in bytes."""
    enter_namespaces(int(first), int(count))
    build_root(directory, mode == "rw")
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), int(largest)))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    os.umask(0)
    os.execvpe(program, [program, *arguments], {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})  # noqa: S606


if __name__ == "__main__":
    main(*sys.argv[1:])
