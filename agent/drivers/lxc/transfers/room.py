"""How much a transfer may take of the pool that all containers share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from agent.storage import Storage
from common.errors import NoSpace

KEPT_FREE = 256 * 2**20
"""Bytes of the pool which no transfer may take."""
_SLACK = 64 * 2**20
_CHECK_EVERY = 0.5


def bound(storage: Storage, disk: int | None, shared: int) -> int:
    """What a volume may come to refer to, in bytes: its container's limit with some slack, if the pool has the room.

    `shared` bytes of it are there already. Raises NoSpace.
    """
    room = storage.pool()[1] - KEPT_FREE
    if room <= 0:
        raise NoSpace("the pool is full")
    most = room + shared
    return most if disk is None else min(most, disk + disk // 8 + _SLACK)


async def within_room(storage: Storage, work: Coroutine[Any, Any, None]) -> None:
    """Do work that fills the pool, but not to the brim. Raises NoSpace."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=_CHECK_EVERY))[0]:
            if storage.pool()[1] < KEPT_FREE // 2:
                raise NoSpace("the container does not fit into the pool")
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
