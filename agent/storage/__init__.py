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

__all__ = ["Storage", "all_storages", "open_storage"]


def all_storages(config: AgentConfig) -> tuple[Storage, Storage]:
    """Both storages that a node with these settings may have had, for taking them down; not opened."""
    if config.pool is not None:
        # A directory of its own in the pool: what else is there is not ours, and several nodes may share it.
        pool = BtrfsStorage(config.pool / config.cgroup, None)
    else:
        pool = BtrfsStorage(config.state / "pool", _loop(config))
    return pool, DirStorage(config.state / "volumes")


def _loop(config: AgentConfig) -> LoopPool:
    return LoopPool(config.state / "pool.img", config.state / "pool", config.pool_size)


async def open_storage(config: AgentConfig) -> Storage:
    """The opened storage that the settings ask for; `auto` is btrfs where it can be had.

    A node that has begun with one keeps it. Raises DriverFailed when the storage asked for cannot be used.
    """
    loop = _loop(config)
    pool, directories = all_storages(config)
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
