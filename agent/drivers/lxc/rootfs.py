"""Looking into and changing a container's root file system from outside, where every name may be a trap.

The kernel resolves the paths within the root (openat2(2)): what a link in them says leads nowhere else.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.storage.volumes import translated

SIGPWR = "SIGPWR"
SIGRTMIN_3 = "SIGRTMIN+3"
_MACHINE_ID_IN = ("etc", "var/lib/dbus")
_OPENAT2 = 437
_NO_MAGICLINKS = 0x02
_NO_SYMLINKS = 0x04
_BENEATH = 0x08
_IN_ROOT = 0x10
_LIBC = ctypes.CDLL(None, use_errno=True)


def _open(root: int, path: str, flags: int, resolve: int) -> int:
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve | _NO_MAGICLINKS)
    descriptor = _LIBC.syscall(_OPENAT2, root, os.fsencode(path), how, len(how))
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return int(descriptor)


@contextmanager
def _directory(root: Path, path: str) -> Iterator[int | None]:
    """A directory inside that is reached without any link; None when there is none."""
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found: int | None = None
    try:
        found = _open(top, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, _BENEATH | _NO_SYMLINKS)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
            raise
    finally:
        os.close(top)
    try:
        yield found
    finally:
        if found is not None:
            os.close(found)


def halt_signal(root: Path) -> str:
    """The signal on which the root's init shuts down: systemd's, or else SIGPWR (busybox, sysvinit, OpenRC).

    Empty when there is no init.
    """
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        init = _open(top, "sbin/init", os.O_PATH, _IN_ROOT)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return ""
    finally:
        os.close(top)
    try:
        program = Path(f"/proc/self/fd/{init}").readlink()
    finally:
        os.close(init)
    return SIGRTMIN_3 if program.name == "systemd" else SIGPWR


def set_hostname(root: Path, hostname: str, owner: int) -> None:
    """Write /etc/hostname, if there is an /etc, for `owner` (a host id). Raises DriverFailed, NoSpace."""
    try:
        with _directory(root, "etc") as etc:
            if etc is not None and _content(etc, "hostname") != f"{hostname}\n".encode():
                _replace(etc, "hostname", f"{hostname}\n".encode(), 0o644, owner)
    except OSError as error:
        raise translated(error, "the hostname cannot be written") from error


def renew_machine_id(root: Path, owner: int) -> None:
    """Give the root a machine-id of its own where it has one (machine-id(5)). Raises DriverFailed, NoSpace."""
    _set_machine_id(root, None, owner)


def keep_machine_id(root: Path, old: Path, owner: int) -> None:
    """Give the root the machine-id that `old`, a root of the same container, has, or else a new one."""
    _set_machine_id(root, old, owner)


def _set_machine_id(root: Path, old: Path | None, owner: int) -> None:
    content = None
    try:
        if old is not None:
            with _directory(old, "etc") as directory:
                content = _content(directory, "machine-id") if directory is not None else None
        content = content or f"{secrets.token_hex(16)}\n".encode()
        for path in _MACHINE_ID_IN:
            with _directory(root, path) as directory:
                # D-Bus's is mostly a link to the other one.
                if directory is not None and _is_file(directory, "machine-id"):
                    _replace(directory, "machine-id", content, 0o444, owner)
    except OSError as error:
        raise translated(error, "the machine-id cannot be written") from error


def machine_ids(root: Path) -> list[str]:
    """The paths of the root's machine-ids that are files of their own. Raises DriverFailed."""
    found = []
    try:
        for path in _MACHINE_ID_IN:
            with _directory(root, path) as directory:
                if directory is not None and _is_file(directory, "machine-id"):
                    found.append(f"{path}/machine-id")
    except OSError as error:
        raise translated(error, "the machine-id cannot be looked for") from error
    return found


def _is_file(directory: int, name: str) -> bool:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode & 0o170000 == 0o100000
    except FileNotFoundError:
        return False


def _content(directory: int, name: str) -> bytes | None:
    if not _is_file(directory, name):
        return None
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _replace(directory: int, name: str, content: bytes, mode: int, owner: int) -> None:
    """Put a file in the place of whatever has its name, in one step."""
    new = f".{name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(new, flags, 0o600, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            os.fchown(handle.fileno(), owner, owner)
            os.fchmod(handle.fileno(), mode)
        os.replace(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(new, dir_fd=directory)
        raise
