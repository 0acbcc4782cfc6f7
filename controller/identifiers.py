"""Identifiers that the controller makes."""

from __future__ import annotations

import secrets
import time
import uuid


def operation_id() -> str:
    """A UUID of version 7 (RFC 9562): their order is that of their creation."""
    nanoseconds = time.time_ns()
    milliseconds, rest = divmod(nanoseconds, 1_000_000)
    fraction = rest * 4096 // 1_000_000
    value = (milliseconds & (2**48 - 1)) << 80 | 7 << 76 | fraction << 64 | 2 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=value))


def hardware_address() -> str:
    """A random MAC address with the prefix that LXC uses for its containers (00:16:3e)."""
    return "00:16:3e:" + ":".join(f"{part:02x}" for part in secrets.token_bytes(3))


def container_id() -> str:
    """An id for a container whose creator gave none."""
    return "c" + secrets.token_hex(5)
