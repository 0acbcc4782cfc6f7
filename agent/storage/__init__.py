"""Where the file systems of images, containers and snapshots live: `btrfs`, or plain directories."""

from __future__ import annotations

import logging

from agent.config import AgentConfig
from agent.storage.base import Storage
from agent.storage.btrfs import BtrfsStorage
from agent.storage.dir import DirStorage
from agent.storage.loop import LoopPool
from common.errors import DriverFailed

log = logging.getLogger(__name__)

__all__ = ["Storage", "open_storage"]


async def open_storage(config: AgentConfig) -> Storage:
    """The opened storage that the settings ask for; `auto` is btrfs where it can be had.

    A node that has begun with one keeps it. Raises DriverFailed when the storage asked for cannot be used.
    """
    loop = LoopPool(config.state / "pool.img", config.state / "pool", config.pool_size)
    directories = DirStorage(config.state / "volumes")
    pool = BtrfsStorage(config.pool or config.state / "pool", None if config.pool is not None else loop)
    chosen: Storage = directories if config.storage == "dir" else pool
    if config.storage == "auto" and config.pool is None and not loop.exists and directories.root.exists():
        chosen = directories
    try:
        await chosen.open()
    except DriverFailed as error:
        if config.storage != "auto" or config.pool is not None or loop.exists:
            raise
        log.warning("btrfs cannot be used here, containers go into plain directories", extra={"reason": error.text})
        chosen = directories
        await chosen.open()
    return chosen
