"""The whole controller on PostgreSQL: its life, its restart, and the server's."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from common.errors import Unavailable
from controller.store import backup, health
from controller.store.db import Database
from controller.store.mark import Mark
from tests.helpers.api import EMPTY, effects, make, name, scripted
from tests.helpers.cluster import BUSYBOX, Cluster, cluster, until
from tests.helpers.postgresql import Server, server

pytestmark = pytest.mark.xdist_group("postgresql")


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Server]:
    with server() as running:
        yield running


@pytest.fixture
async def fleet(postgresql: Server, tmp_path: Path) -> AsyncIterator[Cluster]:
    with postgresql.database() as url:
        async with cluster(tmp_path, nodes=1, database_url=url) as made:
            yield made


async def _runs(fleet: Cluster, container: str) -> bool:
    return bool((await fleet.show(container))["status"]["status"] == "Running")


async def test_containers_live_and_survive_a_restart(fleet: Cluster) -> None:
    container = await make(fleet, start=True, source=BUSYBOX, config={"limits.memory": "64MB"}, description="ä")
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "s"})
    await fleet.stop_controller()
    await fleet.start_controller()
    assert (await fleet.call("GET", "/1.0/reconciliation"))["metadata"]["active"] is False
    await fleet.wait_for_node("node1", "Online")
    await until(lambda: _runs(fleet, container), "it runs")
    assert (await fleet.show(container))["description"] == "ä"
    await fleet.done("DELETE", f"/1.0/vz/{container}?force=1")
    assert not (fleet.settings.state / "controller.db").exists()


async def test_a_second_controller_is_refused(fleet: Cluster) -> None:
    second = Database(fleet.settings.url, lambda _: None)
    with pytest.raises(Unavailable, match="another controller"):
        await second.open()
    await second.close()
    await make(fleet)


async def test_the_server_may_fall_down_and_come_back(fleet: Cluster, postgresql: Server) -> None:
    before = await make(fleet, start=True)
    await asyncio.to_thread(postgresql.stop, signal.SIGQUIT)
    try:
        async with asyncio.timeout(5):
            await fleet.refused("POST", f"/1.0/vz/{name()}", {"source": EMPTY, "node": "node1"}, 503)
        assert await _runs(fleet, before), "what is in memory is shown"
        await fleet.refused("GET", "/1.0/operations", None, 503)
    finally:
        await asyncio.to_thread(postgresql.start)
    after = await make(fleet, start=True)
    for container in (before, after):
        await fleet.done("DELETE", f"/1.0/vz/{container}?force=1")


async def test_an_operation_under_way_outlives_the_server(fleet: Cluster, postgresql: Server) -> None:
    container = name()
    body = {"source": EMPTY, "node": "node1", "start": True}
    with scripted(fleet, "node1", delays={"container.start": 0.5}):
        answer = await fleet.call("POST", f"/1.0/vz/{container}", body, 202)
        await until(lambda: effects(fleet, container) == ["container.create"], "it is created")
        await asyncio.to_thread(postgresql.stop, signal.SIGQUIT)
        await asyncio.to_thread(postgresql.start)
    ended = (await fleet.call("GET", f"{answer['operation']}/wait?timeout=30"))["metadata"]
    assert ended["status"] == "Success", ended
    assert await _runs(fleet, container)
    assert effects(fleet, container) == ["container.create", "container.start"]


async def test_a_dump_is_made_while_the_controller_runs(fleet: Cluster, tmp_path: Path) -> None:
    await make(fleet)
    found = backup.backup(fleet.settings.url, tmp_path / "dump")
    assert "pg_dump" in found[0] and (tmp_path / "dump").read_bytes()[:5] == b"PGDMP"
    assert (tmp_path / "dump").stat().st_mode & 0o777 == 0o600


async def test_a_database_that_was_put_back_is_noticed(fleet: Cluster) -> None:
    await make(fleet)
    await fleet.stop_controller()
    number = fleet.app.store.number
    mark = Mark(fleet.settings.state / "store.mark")
    assert health.examine(fleet.settings.url, mark) is None
    mark.open(number + 3)
    mark.close()
    assert "3 commits are missing" in str(health.examine(fleet.settings.url, mark))
    await fleet.start_controller()
    await until(lambda: _accepts(fleet), "the inventory has come")


async def _accepts(fleet: Cluster) -> bool:
    return not (await fleet.call("GET", "/1.0/reconciliation"))["metadata"]["active"]
