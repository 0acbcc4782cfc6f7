"""One process for one state directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import Conflict


@contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the kernel lets go of it however the process ends. Raises Conflict while another has it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"{what} is running in {lock.parent}: stop it first") from None
        yield
    finally:
        os.close(descriptor)
