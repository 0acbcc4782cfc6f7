"""F9: the disk of the controller, or of an agent's journal, is full.

Writes are refused within a second, reads go on, nothing that was acknowledged is lost, and with room it goes on by
itself. The disks are small tmpfs mounts, filled to the last page.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.errors import NoSpace, VzfleetError
from controller.store import db
from tests.failure.report import Report
from tests.helpers.api import EMPTY, effects, make, name, scripted
from tests.helpers.cluster import Cluster, cluster, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root")
ROOT = Path(__file__).resolve().parents[2]
ROOM = 6 * 2**20
WITHIN, RECOVERS = 1.0, 5.0
"""Seconds in which a write is refused, and in which it works again when there is room."""
ROUNDS, ROUNDS_LONG = 2, 25
UNDER_WAY = 4
READS = ("/1.0", "/1.0/vz?recursion=1", "/1.0/operations?recursion=1", "/1.0/nodes?recursion=1", "/1.0/images")


class Disk:
    """A small disk that can be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Leave no page."""
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """There is room again."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def disk(path: Path) -> Iterator[Disk]:
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM},mode=700", "vz-test", str(path)], check=True)
    try:
        yield Disk(path)
    finally:
        # Lazily: when a controller failed to start, its files are open still.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@asynccontextmanager
async def fleet_on_a_small_disk(directory: Path) -> AsyncIterator[tuple[Cluster, Disk]]:
    directory.mkdir()
    with disk(directory / "controller") as small:
        async with cluster(directory, nodes=1) as fleet:
            try:
                yield fleet, small
            finally:
                small.free()


# ---------------------------------------------------------------- the controller's disk


def every_write(container: str) -> list[tuple[str, str, Any]]:
    return [
        ("POST", f"/1.0/vz/{name()}", {"source": EMPTY, "node": "node1", "description": secrets.token_hex(500)}),
        ("PUT", f"/1.0/vz/{container}", {"config": {"user.x": secrets.token_hex(500)}}),
        ("POST", f"/1.0/vz/{container}/snapshots", {"name": name("s")}),
        ("POST", "/1.0/nodes", {"name": name("node")}),
        ("DELETE", f"/1.0/vz/{container}", None),
    ]


async def timed(fleet: Cluster, method: str, path: str, body: Any = None) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    return await fleet.request(method, path, body), time.monotonic() - began


async def begin(fleet: Cluster) -> dict[str, str]:
    """Operations that are under way when the disk becomes full: their steps cannot be recorded until there is room."""
    begun: dict[str, str] = {}
    with scripted(fleet, "node1", delays={"container.create": 0.3}):
        for _ in range(UNDER_WAY):
            container = name()
            answer = await fleet.call("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": "node1"}, 202)
            begun[answer["operation"]] = container
        await until(lambda: _accepted(fleet), "the node has begun")
    return begun


async def fill_up(report: Report, fleet: Cluster, small: Disk) -> dict[str, str]:
    """Fill the disk and write until it is felt; what was accepted meanwhile, by operation."""
    small.fill()
    accepted: dict[str, str] = {}
    for _ in range(2000):
        container = name()
        body = {"source": EMPTY, "node": "node1", "description": secrets.token_hex(500)}
        answer, took = await timed(fleet, "POST", f"/1.0/vz/{container}", body)
        if answer.status_code != 202:
            check_refusal(report, answer, took)
            return accepted
        accepted[answer.json()["operation"]] = container
        small.fill()
    raise AssertionError("the disk was never full")


def check_refusal(report: Report, answer: httpx.Response, took: float) -> None:
    """A write on a full disk: refused, at once, with the reason."""
    report.check(answer.status_code in (507, 503), f"a write answered {answer.status_code}: {answer.text[:200]}")
    report.check(took < WITHIN, f"a write was refused after {took:.2f} s")
    code = answer.json()["metadata"]["code"]
    report.check(code in ("no-space", "unavailable"), f"a refusal says {code}")


async def check_reads(report: Report, fleet: Cluster) -> None:
    for path in READS:
        answer, took = await timed(fleet, "GET", path)
        report.check(answer.status_code == 200, f"GET {path} answered {answer.status_code} on a full disk")
        report.check(took < WITHIN, f"GET {path} took {took:.2f} s on a full disk")


async def check_nothing_is_lost(report: Report, fleet: Cluster, accepted: dict[str, str]) -> None:
    """Every operation that was accepted ends in Success, and its container is there, now and after a restart."""
    for operation, container in accepted.items():
        answer = await fleet.request("GET", f"{operation}/wait?timeout=20")
        ended = answer.json()["metadata"].get("status") if answer.status_code == 200 else answer.text
        report.check(ended == "Success", f"an accepted operation is {ended}")
        report.check(effects(fleet, container) == ["container.create"], f"effects of {container}")
    await fleet.stop_controller()
    await fleet.start_controller()
    await fleet.wait_for_node("node1", "Online")
    for operation, container in accepted.items():
        for path in (operation, f"/1.0/vz/{container}"):
            answer = await fleet.request("GET", path)
            report.check(answer.status_code == 200, f"{path} is lost after a restart: {answer.status_code}")
    database = sqlite3.connect(fleet.settings.state / "controller.db")
    found = database.execute("PRAGMA integrity_check").fetchall()
    database.close()
    report.check(found == [("ok",)], f"the database is damaged: {found}")


@pytest.mark.failure("F9")
async def test_the_controllers_disk_is_full(report: Report, tmp_path: Path, long_run: bool) -> None:
    async with fleet_on_a_small_disk(tmp_path / "fleet") as (fleet, small):
        accepted: dict[str, str] = {}
        for _ in range(ROUNDS_LONG if long_run else ROUNDS):
            small.free()
            container = await make(fleet, node="node1")
            accepted |= await begin(fleet)
            accepted |= await fill_up(report, fleet, small)
            for method, path, body in every_write(container):
                small.fill()
                answer, took = await timed(fleet, method, path, body)
                check_refusal(report, answer, took)
                report.faults += 1
            await check_reads(report, fleet)
            small.free()
            began = time.monotonic()
            await make(fleet, node="node1")
            report.check(time.monotonic() - began < RECOVERS, "it does not recover by itself")
        report.figures["operations"] = len(accepted)
        await check_nothing_is_lost(report, fleet, accepted)


async def test_an_answer_without_a_commit_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that answers before it knows is found out."""
    tampered = Report("F9, broken")

    def lie(job: Any) -> None:
        if not job.future.done():
            job.future.set_result(job.result)

    async with fleet_on_a_small_disk(tmp_path / "fleet") as (fleet, small):
        small.fill()
        with monkeypatch.context() as patch:
            patch.setattr(db, "_answer", lie)
            for _ in range(2000):
                container = name()
                body = {"source": EMPTY, "node": "node1", "description": secrets.token_hex(500)}
                before = fleet.app.store.number
                answer = await fleet.request("POST", f"/1.0/vz/{container}", body)
                small.fill()
                if fleet.app.store.number == before:
                    break
        small.free()
        assert answer.status_code == 202, "it was answered, and nothing was committed"
        await check_nothing_is_lost(tampered, fleet, {answer.json()["operation"]: container})
    assert tampered.violations


async def test_a_controller_is_not_started_on_a_full_disk_and_is_when_there_is_room(tmp_path: Path) -> None:
    async with fleet_on_a_small_disk(tmp_path / "fleet") as (fleet, small):
        container = await make(fleet, node="node1")
        await fill_up(Report("F9, start"), fleet, small)
        await fleet.stop_controller()
        small.fill()
        try:
            await fleet.start_controller()
        except (VzfleetError, OSError) as error:
            assert isinstance(error, NoSpace) or "full" in str(error).lower() or "space" in str(error), error
            await fleet.app.store.close()
            small.free()
            await fleet.start_controller()
        small.free()
        await fleet.wait_for_node("node1", "Online")
        assert (await fleet.show(container))["status"]["status"] == "Stopped"
        await make(fleet, node="node1")


async def test_an_upload_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    async with fleet_on_a_small_disk(tmp_path / "fleet") as (fleet, small):
        headers = {"Content-Type": "application/octet-stream"}
        began = time.monotonic()
        await fleet.refused("POST", "/1.0/images", None, 507, content=bytes(ROOM + 2**20), headers=headers)
        assert time.monotonic() - began < 5
        incoming = small.path / "images" / "incoming"
        assert not incoming.exists() or not list(incoming.iterdir())
        small.fill()
        with pytest.raises(NoSpace):
            for _ in range(1000):
                await fleet.app.nodes.save_figures()
                small.fill()
        small.free()
        await fleet.app.nodes.save_figures()
        await make(fleet, node="node1")


# ---------------------------------------------------------------- the disk of an agent's journal


@asynccontextmanager
async def fleet_with_a_small_journal(directory: Path) -> AsyncIterator[tuple[Cluster, Disk]]:
    """Of node1 the state is on a small disk, all but the world of its fake driver."""
    directory.mkdir()
    with disk(directory / "node1") as small:
        (directory / "world").mkdir()
        (small.path / "fake").symlink_to(directory / "world")
        async with cluster(directory, nodes=1) as fleet:
            try:
                yield fleet, small
            finally:
                small.free()


async def fill_journal(fleet: Cluster, small: Disk, container: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill the disk and give commands until one is refused; returns its body and the operation that failed."""
    small.fill()
    for number in range(500):
        body = {"action": ("start", "stop")[number % 2], "force": True}
        ended = await fleet.operation("PUT", f"/1.0/vz/{container}/state", body)
        if ended["status"] != "Success":
            return body, ended
        small.fill()
    raise AssertionError("the journal was never full")


@pytest.mark.failure("F9, journal")
async def test_the_journals_disk_is_full(report: Report, tmp_path: Path) -> None:
    async with fleet_with_a_small_journal(tmp_path / "fleet") as (fleet, small):
        container = await make(fleet, node="node1")
        body, ended = await fill_journal(fleet, small, container)
        done = effects(fleet, container)
        report.faults += 1
        report.check("journal is full" in ended["err"], f"the reason is not told: {ended['err']}")
        for _ in range(3):
            began = time.monotonic()
            ended = await fleet.operation("PUT", f"/1.0/vz/{container}/state", body)
            report.faults += 1
            report.check("journal is full" in ended["err"], f"the reason is not told: {ended['err']}")
            report.check(time.monotonic() - began < RECOVERS, "the failure takes long")
        report.check(effects(fleet, container) == done, "something was run that is not in the journal")
        node = (await fleet.call("GET", "/1.0/nodes/node1"))["metadata"]
        report.check(node["status"] == "Online", f"the node is {node['status']}")
        small.free()
        began = time.monotonic()
        await make(fleet, node="node1", start=True)
        report.check(time.monotonic() - began < RECOVERS, "it does not recover by itself")


@pytest.mark.failure("F9, result")
async def test_a_result_that_cannot_be_kept_waits_for_room(report: Report, tmp_path: Path) -> None:
    """The command has run when its result cannot be kept: it is told when it can, and never run again."""
    async with fleet_with_a_small_journal(tmp_path / "fleet") as (fleet, small):
        container = name()
        with scripted(fleet, "node1", delays={"container.create": 0.5}):
            body = {"source": EMPTY, "node": "node1"}
            answer = await fleet.call("POST", f"/1.0/vz/{container}", body, 202)
            await until(lambda: _accepted(fleet), "the node has begun")
            small.fill()
            report.faults += 1
            await until(lambda: effects(fleet, container) == ["container.create"], "it has run")
        ended = asyncio.ensure_future(fleet.call("GET", f"{answer['operation']}/wait?timeout=20"))
        small.free()
        status = (await ended)["metadata"]["status"]
        report.check(status == "Success", f"the operation is {status}")
        report.check(effects(fleet, container) == ["container.create"], "it was run again")


def _accepted(fleet: Cluster) -> bool:
    calls = fleet.app.dispatcher._peers["node1"].calls.values()
    return any(call.accepted for call in calls)


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    """`/dev/full` answers every write with ENOSPC, as a full disk does."""
    program = "from common import logs; import logging; logs.set_up(); logging.getLogger('x').error('y'); print('on')"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, cwd=ROOT)
    assert done.stdout == b"on\n"
