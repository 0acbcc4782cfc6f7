"""Refusing limits below what a container uses now, by its last figures; its node, which may know newer ones, has the
last word.
"""

from __future__ import annotations

from common.errors import InvalidRequest
from common.options import Settings
from controller.live import LiveContainer


def check_limits(live: LiveContainer, old: Settings, new: Settings, node_memory: int) -> None:
    """Raise InvalidRequest for a changed limit of disk or memory that is below the present use.

    `node_memory` in bytes is for limits in %. What is not known is not refused.
    """
    check_disk(live, old, new)
    figures, limit = live.figures, new.memory_bytes(node_memory)
    if figures.memory_usage is not None and limit != old.memory_bytes(node_memory):
        # What cannot be reclaimed: `free_memory` is the limit less this.
        needed = figures.memory_usage - (figures.memory_reclaimable or 0)
        _refuse_below(live.record.id, limit, needed, "config.limits.memory")


def check_disk(live: LiveContainer, old: Settings, new: Settings) -> None:
    """The same for the disk limit alone, as it is for a copy of `live` or when it moves."""
    if new.disk != old.disk and live.figures.disk_usage is not None:
        _refuse_below(live.record.id, new.disk, live.figures.disk_usage, "config.limits.disk")


def _refuse_below(container: str, limit: int | None, used: int, field: str) -> None:
    if limit is not None and limit < used:
        raise InvalidRequest(
            f"{limit} bytes are less than the {used} that container {container} uses now",
            field=field,
            allowed=f"at least its present use, {used} bytes",
        )
