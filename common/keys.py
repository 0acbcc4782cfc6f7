"""CURVE key files: two lines of Z85, public and secret, readable by their owner only."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from common.errors import Forbidden, InvalidRequest


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair in Z85. The secret half is never shown by repr."""

    public: str
    secret: str = field(repr=False)


def generate() -> KeyPair:
    """A new key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def check_public_key(text: str, field: str = "public_key") -> str:
    """Return `text` if it is a CURVE key in Z85 (ZeroMQ RFC 32), else raise InvalidRequest."""
    try:
        raw = z85.decode(text)
    except (ValueError, KeyError, struct.error):
        raw = b""
    if len(raw) != 32:
        raise InvalidRequest("not a CURVE public key", field=field, allowed="40 characters of Z85")
    return text


def check_private(path: Path) -> None:
    """Raise Forbidden when anyone but the owner may read the file."""
    mode = path.stat().st_mode
    if stat.S_IMODE(mode) & 0o077:
        raise Forbidden(f"{path} can be read by others: chmod 600 {path}")


def write_private(path: Path, text: str) -> None:
    """Write a file with mode 600, durably and in one step."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        os.fchmod(handle.fileno(), 0o600)
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def load(path: Path) -> KeyPair:
    """Read a key pair. Raises Forbidden when others can read it, OSError or ValueError when it is not one."""
    check_private(path)
    lines = path.read_text(encoding="ascii").split()
    if len(lines) != 2 or any(len(line) != 40 for line in lines):
        raise ValueError(f"{path} is no key file: two lines of 40 characters are expected")
    return KeyPair(lines[0], lines[1])


def load_or_create(path: Path) -> KeyPair:
    """Read a key pair, making it on the first run."""
    if not path.exists():
        pair = generate()
        write_private(path, f"{pair.public}\n{pair.secret}\n")
    return load(path)
