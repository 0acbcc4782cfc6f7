"""Identifiers that the controller makes."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
import uuid
from datetime import datetime


class OperationIds:
    """UUIDs of version 7 (RFC 9562) whose order is that of their creation, also when the clock is set back.

    Their time counts in 4,096ths of a millisecond; it goes on from the last one where the clock shows an earlier one.
    """

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()

    def follow(self, identity: str) -> None:
        """Let every id from now on come after this one."""
        value = uuid.UUID(identity).int
        with self._lock:
            self._last = max(self._last, value >> 80 << 12 | value >> 64 & 0xFFF)

    def new(self) -> str:
        """A new id."""
        now = time.time_ns() * 4096 // 1_000_000
        with self._lock:
            self._last = max(now, self._last + 1)
            ticks = self._last & (2**60 - 1)
        value = ticks >> 12 << 80 | 7 << 76 | (ticks & 0xFFF) << 64 | 2 << 62 | secrets.randbits(62)
        return str(uuid.UUID(int=value))


operation_ids = OperationIds()


def operation_id() -> str:
    """An id for an operation, after all before."""
    return operation_ids.new()


def moment_id(moment: datetime, owner: str) -> str:
    """The id of the one operation that a moment asks of an owner: the same whenever it is made."""
    ticks = round(moment.timestamp() * 1000)
    rest = int.from_bytes(hashlib.sha256(f"{moment.timestamp():.0f} {owner}".encode()).digest()) & (2**74 - 1)
    value = ticks << 80 | 7 << 76 | rest >> 62 << 64 | 2 << 62 | rest & (2**62 - 1)
    return str(uuid.UUID(int=value))


def hardware_address() -> str:
    """A random MAC address with the prefix that LXC uses for its containers (00:16:3e)."""
    return "00:16:3e:" + ":".join(f"{part:02x}" for part in secrets.token_bytes(3))


def container_id() -> str:
    """An id for a container whose creator gave none."""
    return "c" + secrets.token_hex(5)
