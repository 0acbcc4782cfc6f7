"""Limits below what a container uses now are refused before the 202, by the last figures; the rest is accepted.

A fake container's files take 20 to 100 MB, and 6 to 48 MB of its memory cannot be reclaimed.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.api import make, name, nothing_happens
from tests.helpers.cluster import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")
SMALL_DISK, SMALL_MEMORY = {"limits.disk": "10MB"}, {"limits.memory": "5MB"}


async def use_of(fleet: Cluster, container: str) -> tuple[int, int | None]:
    """Bytes of disk, and bytes of memory that cannot be reclaimed (None: it does not run)."""
    state = (await fleet.call("GET", f"/1.0/vz/{container}/state"))["metadata"]
    memory = state["memory"]
    needed = None if memory["usage"] is None else memory["usage"] - memory["reclaimable"]
    return state["disk"]["root"]["usage"], needed


def wrong(answer: dict[str, Any], field: str, least: int | None) -> None:
    metadata = answer["metadata"]
    assert (metadata["code"], metadata["field"]) == ("invalid", field), answer
    assert least is not None and str(least) in metadata["allowed"], answer


async def test_a_disk_limit_below_its_use(fleet: Cluster) -> None:
    container = await make(fleet)
    used, _ = await use_of(fleet, container)
    async with nothing_happens(fleet):
        for config in (SMALL_DISK, {"limits.disk": str(used - 1)}):
            answer = await fleet.refused("PUT", f"/1.0/vz/{container}", {"config": config}, 400)
            wrong(answer, "config.limits.disk", used)
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {"limits.disk": str(used)}})
    # A limit that stays as it is does not stand in the way of other changes.
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {"limits.disk": str(used), "user.a": "b"}})
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {}})


async def test_a_memory_limit_below_what_cannot_be_reclaimed(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    _, needed = await use_of(fleet, container)
    async with nothing_happens(fleet):
        answer = await fleet.refused("PUT", f"/1.0/vz/{container}", {"config": SMALL_MEMORY}, 400)
        wrong(answer, "config.limits.memory", needed)
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {"limits.memory": str(needed)}})
    # What does not run uses none.
    await fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "stop", "force": True})
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": SMALL_MEMORY})


async def test_a_copy_or_a_move_into_less_than_it_uses(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    used, _ = await use_of(fleet, container)
    copy = {"source": {"type": "copy", "source": container}}
    move = {"source": {"type": "migration", "source": container}, "node": "node2"}
    async with nothing_happens(fleet):
        for path, body in ((name(), copy), (container, move)):
            answer = await fleet.refused("POST", f"/1.0/vz/{path}", {**body, "config": SMALL_DISK}, 400)
            wrong(answer, "config.limits.disk", used)
    enough = {"limits.disk": str(used)}
    await fleet.done("POST", f"/1.0/vz/{name()}", {**copy, "config": enough})
    await fleet.done("POST", f"/1.0/vz/{container}", {**move, "config": enough})
