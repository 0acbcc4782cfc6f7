"""Which host, which boot of it and which run of the agent this is."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from common import VERSION

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True)
class Identity:
    """`boot_id` is the kernel's, `machine_id` the host's (empty where it has none), `instance` new with each run."""

    boot_id: str
    machine_id: str
    instance: str
    version: str = VERSION


def read_boot_id() -> str:
    """The kernel's random id of this boot."""
    return BOOT_ID.read_text(encoding="ascii").strip()


def read_identity() -> Identity:
    """Who this agent is, as far as the host tells."""
    machine = MACHINE_ID.read_text(encoding="ascii").strip() if MACHINE_ID.exists() else ""
    return Identity(read_boot_id(), machine[:128], str(uuid.uuid4()))
