"""Snapshots by schedule and their expiry, by a clock that the test moves: taken, left out, told, never twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.commands import CreateSnapshot, DeleteSnapshot, StopContainer
from common.errors import DriverFailed
from common.states import NodeStatus
from common.tasks import Tasks
from controller.records import NodeMode, Operation, Phase, Power, Snapshot
from controller.services.requests import RenameBody, SnapshotBody, StateBody
from controller.services.schedules import LATE, RETRY, Schedules
from controller.services.turns import Turns
from controller.store import containers as rows
from controller.store import nodes as node_rows
from controller.store.db import Transaction
from tests.helpers.cluster import until
from tests.helpers.core import CALLER, Core, make_template, open_core

HOUR = 3600.0


class Told:
    """What stands for the bus of events."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str, dict[str, Any]]] = []

    def note(self, action: str, _source: str, *, container: str, node: str | None, details: dict[str, Any]) -> None:
        self.notes.append((action, container, details))


class Scene:
    """A core with schedules; c runs, d is stopped, z is frozen."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.told = Told()
        self.writable = True
        self.begin()

    def begin(self) -> None:
        """As the controller begins."""
        self.schedules = Schedules(
            self.core.containers,
            self.core.snapshots,
            self.told,  # type: ignore[arg-type]
            self.core.clock,
            lambda: self.writable,
        )

    async def look(self) -> None:
        """Look at the clock, and wait until all that is due is done."""
        await self.schedules.look()
        await until(lambda: not self.schedules.busy, "all is done")

    async def at(self, text: str) -> None:
        """Move the clock there, and look."""
        self.core.clock.advance((moment(text) - self.core.clock.now()).total_seconds())
        await self.look()

    async def change(self, container: str, **fields: Any) -> None:
        """Change a container's row."""

        def write(transaction: Transaction) -> None:
            rows.rows.replace(transaction, replace(rows.require(transaction, container), **fields))

        await self.core.store.write(write)

    async def schedule(self, container: str, schedule: str, **more: str) -> None:
        """Give it a schedule, and other keys of snapshots.*."""
        keys = {f"snapshots.{key.replace('_', '.')}": value for key, value in more.items()}
        await self.change(container, config={"snapshots.schedule": schedule, **keys})

    def snapshots(self, container: str) -> list[Snapshot]:
        """Those that were taken by schedule, the oldest first."""
        found = self.core.fleet.containers[container].snapshots.values()
        return sorted((one for one in found if one.scheduled), key=lambda one: one.created_at)

    def operations(self, kind: str) -> list[Operation]:
        """Those of a kind that have ended."""
        records = [change.record for change in self.core.changes_seen]
        return [one for one in records if isinstance(one, Operation) and one.kind == kind and one.ended_at]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    template = await asyncio.to_thread(make_template, tmp_path)
    core = await open_core(template, tmp_path / "core")
    core.clock.set(moment("2026-03-14T11:50:00"))
    scene = Scene(core)
    yield scene
    await scene.schedules.close()
    await core.close()


# ---------------------------------------------------------------- taken at its moment, once


async def test_one_a_moment(scene: Scene) -> None:
    await scene.schedule("c", "@hourly", expiry="1d", pattern="auto%d")
    for text in ("11:59:59", "12:00:00", "12:00:01", "12:01:00", "12:30:00", "12:59:59"):
        await scene.at(f"2026-03-14T{text}")
    await scene.at("2026-03-14T13:00:02")
    first, second = scene.snapshots("c")
    assert (first.name, second.name) == ("auto0", "auto1")
    assert (first.created_at, first.expires_at) == ("2026-03-14T12:00:00.000000Z", "2026-03-15T12:00:00.000000Z")
    assert second.expires_at == "2026-03-15T13:00:02.000000Z"
    assert scene.core.there.there["n1", "c"].snapshots == {"s0", "auto0", "auto1"}
    assert [one.requestor.username for one in scene.operations("snapshot.create")] == ["schedule"] * 2
    assert scene.operations("snapshot.create")[0].metadata["moment"] == "2026-03-14T12:00:00.000000Z"
    assert scene.told.notes == []


async def test_not_twice_across_a_restart(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    await scene.at("2026-03-14T12:00:00")
    for _ in range(3):
        scene.begin()
        await scene.look()
    accepted = await scene.core.changes.rename(CALLER, "c", RenameBody(hostname="other"))
    await scene.core.engine.wait(accepted.id, 10)
    scene.begin()
    await scene.look()
    assert len(scene.snapshots("c")) == 1 and len(scene.operations("snapshot.create")) == 1
    assert scene.told.notes == []


async def test_not_twice_while_the_first_is_under_way_through_a_restart(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    scene.core.there.hanging.add(CreateSnapshot)
    scene.core.clock.set(moment("2026-03-14T12:00:00"))
    await scene.schedules.look()
    await until(lambda: scene.core.there.waiting, "it is asked")
    await scene.schedules.close()
    await scene.core.engine.close()
    scene.core.there.hanging.clear()
    scene.core.use_engine()
    scene.begin()
    await scene.look()
    await scene.core.engine.resume()
    held = (await scene.core.rows())["c"].operation
    if held is not None:
        await scene.core.engine.wait(held, 10)
    await scene.look()
    assert len(scene.snapshots("c")) == 1 and scene.told.notes == []


async def test_what_fell_due_while_the_controller_was_away_is_taken_if_it_is_not_long_ago(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    scene.core.clock.set(moment("2026-03-14T12:00:00") + LATE - timedelta(seconds=1))
    scene.begin()
    await scene.look()
    assert len(scene.snapshots("c")) == 1
    scene.core.clock.set(moment("2026-03-14T13:00:00") + LATE + timedelta(seconds=1))
    scene.begin()
    await scene.look()
    assert len(scene.snapshots("c")) == 1


async def test_of_several_moments_at_once_only_the_last(scene: Scene) -> None:
    await scene.schedule("c", "* * * * *")
    await scene.at("2026-03-14T11:58:30")
    await scene.at("2026-03-14T12:04:30")
    assert [one.metadata["moment"][11:16] for one in scene.operations("snapshot.create")] == ["11:58", "12:04"]


async def test_a_clock_that_is_set_back_repeats_no_moment(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    await scene.at("2026-03-14T12:00:30")
    await scene.at("2026-03-14T11:30:00")
    await scene.at("2026-03-14T12:00:30")
    await scene.at("2026-03-14T13:00:00")
    moments = [one.metadata["moment"][11:16] for one in scene.operations("snapshot.create")]
    assert moments == ["12:00", "13:00"] and scene.told.notes == []


async def test_one_that_was_made_after_the_moment_is_not_late_for_it(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    await scene.change("c", created_at="2026-03-14T12:00:10.000000Z")
    await scene.at("2026-03-14T12:00:30")
    assert scene.snapshots("c") == []


async def test_by_the_running_clock(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task itself looks once a minute of the clock, and goes on after a fault."""
    monkeypatch.setattr("controller.services.schedules.LOOK", 0.005)
    await scene.schedule("c", "* * * * *")
    looks: list[datetime] = []
    look = scene.schedules.look

    async def counted() -> None:
        looks.append(scene.core.clock.now())
        await look()

    monkeypatch.setattr(scene.schedules, "look", counted)
    scene.schedules.start()
    for minute in range(3):
        await until(lambda wanted=minute: len(scene.operations("snapshot.create")) > wanted, "one is taken")
        scene.core.clock.advance(60)
    assert len(looks) in (3, 4)


# ---------------------------------------------------------------- what is left out, and told


async def test_a_stopped_one_only_where_it_is_wanted(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for container in ("c", "d", "z"):
        await scene.schedule(container, "@hourly")
    await scene.at("2026-03-14T12:00:00")
    assert [len(scene.snapshots(id)) for id in ("c", "d", "z")] == [1, 0, 1], "a frozen one is not stopped"
    assert scene.told.notes == []
    assert [record.message for record in caplog.records].count(
        "stopped containers are left out of their schedules"
    ) == 1
    await scene.schedule("d", "@hourly", schedule_stopped="true")
    await scene.at("2026-03-14T13:00:00")
    assert len(scene.snapshots("d")) == 1


async def test_a_busy_one_is_told_once(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    scene.core.there.hanging.add(StopContainer)
    stopping = await scene.core.states.change(CALLER, "c", StateBody("stop"))
    await until(lambda: scene.core.there.waiting, "it is asked")
    for text in ("12:00:00", "12:01:00", "12:05:00"):
        await scene.at(f"2026-03-14T{text}")
    (action, container, details), *more = scene.told.notes
    assert (action, container, more) == ("container-snapshot-skipped", "c", [])
    assert details["moment"] == "2026-03-14T12:00:00.000000Z" and "busy" in details["reason"]
    assert scene.snapshots("c") == []
    await scene.core.engine.cancel(stopping.id)


async def test_a_node_out_of_reach_is_told_and_a_draining_one_is_fine(scene: Scene) -> None:
    for container in ("c", "z"):
        await scene.schedule(container, "@hourly")
    scene.core.fleet.node_status("n1", NodeStatus.OFFLINE, "silence")
    await scene.at("2026-03-14T12:00:00")
    assert sorted(note[:2] for note in scene.told.notes) == [
        ("container-snapshot-skipped", "c"),
        ("container-snapshot-skipped", "z"),
    ]
    assert all("out of reach" in details["reason"] for _, _, details in scene.told.notes)
    scene.core.fleet.node_status("n1", NodeStatus.ONLINE, "")

    def drain(transaction: Transaction) -> None:
        record = node_rows.require(transaction, "n1")
        node_rows.rows.replace(transaction, replace(record, mode=NodeMode.DRAINING))

    await scene.core.store.write(drain)
    await scene.at("2026-03-14T13:00:00")
    assert [len(scene.snapshots(id)) for id in ("c", "z")] == [1, 1] and len(scene.told.notes) == 2


async def test_one_that_failed_is_told_and_tried_at_the_next_moment_only(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    scene.core.there.refusals[CreateSnapshot] = DriverFailed("no space in the pool")
    for text in ("12:00:00", "12:01:00", "12:10:00"):
        await scene.at(f"2026-03-14T{text}")
    assert len(scene.operations("snapshot.create")) == 1
    (action, _, details), *more = scene.told.notes
    assert action == "container-snapshot-failed" and "no space" in details["reason"] and more == []
    assert details["operation"].endswith(scene.operations("snapshot.create")[0].id)
    scene.begin()
    await scene.look()
    assert len(scene.operations("snapshot.create")) == 1, "not after a restart either"
    scene.core.there.refusals.clear()
    await scene.at("2026-03-14T13:00:00")
    assert len(scene.snapshots("c")) == 1


async def test_nothing_is_done_while_rows_are_missing(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    await expiring(scene, "c", "old", "2026-03-14T11:00:00")
    scene.writable = False
    await scene.at("2026-03-14T12:00:00")
    scene.writable = True
    await scene.at("2026-03-14T12:00:30")
    assert scene.snapshots("c") == [] and "old" not in scene.core.fleet.containers["c"].snapshots


async def test_what_is_not_whole_or_gone_is_passed_over(scene: Scene) -> None:
    for container in ("c", "z"):
        await scene.schedule(container, "@hourly")
    await scene.change("z", phase=Phase.FAILED, error="broken", power=Power.RUNNING)
    scene.core.clock.set(moment("2026-03-14T12:00:00"))
    await scene.schedules.look()
    await scene.core.store.write(lambda transaction: rows.rows.delete(transaction, "c"))
    await scene.look()
    assert scene.operations("snapshot.create") == [] and len(scene.told.notes) <= 1


async def test_a_schedule_that_cannot_be_read_stands_in_nobodys_way(scene: Scene) -> None:
    await scene.schedule("c", "@hourly")
    await scene.schedule("z", "99 * * * *")
    await scene.at("2026-03-14T12:00:00")
    assert len(scene.snapshots("c")) == 1 and scene.snapshots("z") == []


# ---------------------------------------------------------------- expiry


async def expiring(scene: Scene, container: str, name: str, expires: str | None) -> None:
    text = None if expires is None else f"{expires}.000000Z"
    row = Snapshot(container, name, "2026-03-01T00:00:00.000000Z", {}, text)
    scene.core.there.there["n1", container].snapshots.add(name)
    await scene.core.store.write(lambda transaction: rows.add_snapshot(transaction, row))


async def test_what_has_expired_goes(scene: Scene) -> None:
    await expiring(scene, "c", "a", "2026-03-14T12:00:00")
    await expiring(scene, "c", "b", "2026-03-14T12:00:30")
    await expiring(scene, "c", "later", "2026-03-14T13:00:00")
    await expiring(scene, "d", "stopped", "2026-03-14T12:00:00")
    await scene.at("2026-03-14T11:59:59")
    assert scene.core.fleet.containers["c"].snapshots.keys() == {"s0", "a", "b", "later"}
    await scene.at("2026-03-14T12:01:00")
    assert scene.core.fleet.containers["c"].snapshots.keys() == {"s0", "later"}
    assert scene.core.fleet.containers["d"].snapshots.keys() == set()
    assert scene.core.there.there["n1", "c"].snapshots == {"s0", "later"}
    assert {one.requestor.username for one in scene.operations("snapshot.delete")} == {"schedule"}


async def test_taken_before_the_old_one_goes(scene: Scene) -> None:
    await scene.schedule("c", "@hourly", expiry="1H")
    for hour in (12, 13, 14):
        await scene.at(f"2026-03-14T{hour}:00:00")
    assert [one.name for one in scene.snapshots("c")] == ["snap2"]
    assert len(scene.operations("snapshot.create")) == 3 and len(scene.operations("snapshot.delete")) == 2


async def test_out_of_reach_or_busy_it_waits_in_silence(scene: Scene) -> None:
    await expiring(scene, "c", "a", "2026-03-14T12:00:00")
    scene.core.fleet.node_status("n1", NodeStatus.OFFLINE, "silence")
    for text in ("12:01:00", "12:02:00"):
        await scene.at(f"2026-03-14T{text}")
    assert scene.told.notes == [] and scene.operations("snapshot.delete") == []
    scene.core.fleet.node_status("n1", NodeStatus.ONLINE, "")
    await scene.at("2026-03-14T12:03:00")
    assert "a" not in scene.core.fleet.containers["c"].snapshots


async def test_a_deletion_that_fails_is_no_storm(scene: Scene) -> None:
    await expiring(scene, "c", "a", "2026-03-14T12:00:00")
    scene.core.there.refusals[DeleteSnapshot] = DriverFailed("busy")
    for minute in range(1, 10):
        await scene.at(f"2026-03-14T12:0{minute}:00")
    assert len(scene.operations("snapshot.delete")) == 1
    assert [note[0] for note in scene.told.notes] == ["container-snapshot-failed"]
    scene.core.there.refusals.clear()
    scene.core.clock.advance(RETRY.total_seconds())
    await scene.look()
    await scene.at("2026-03-14T13:30:00")
    assert "a" not in scene.core.fleet.containers["c"].snapshots


async def test_a_snapshot_by_hand_takes_the_rule_of_its_container(scene: Scene) -> None:
    await scene.schedule("c", "", expiry="2H", pattern="hand%d")
    for body in (SnapshotBody(), SnapshotBody("own", expires_at=moment("2026-04-01T00:00:00"))):
        accepted = await scene.core.snapshots.take(CALLER, "c", body)
        await scene.core.engine.wait(accepted.id, 10)
    never = SnapshotBody("never", expires_at=datetime(1, 1, 1, tzinfo=UTC))
    await scene.core.engine.wait((await scene.core.snapshots.take(CALLER, "c", never)).id, 10)
    found = scene.core.fleet.containers["c"].snapshots
    assert found["hand0"].expires_at == "2026-03-14T13:50:00.000000Z" and not found["hand0"].scheduled
    assert found["own"].expires_at == "2026-04-01T00:00:00.000000Z" and found["never"].expires_at is None


# ---------------------------------------------------------------- turns


async def test_so_many_at_once_and_every_node_has_its_turn() -> None:
    tasks, at_work, most, order = Tasks("test"), dict[str, int](), dict[str, int](), list[str]()

    async def work(container: str) -> None:
        node = container.partition("-")[0]
        for key in (node, "all"):
            at_work[key] = at_work.get(key, 0) + 1
            most[key] = max(most.get(key, 0), at_work[key])
        order.append(container)
        for _ in range(5):
            await asyncio.sleep(0)
        for key in (node, "all"):
            at_work[key] -= 1

    turns = Turns(work, tasks, together=6, on_a_node=2)
    for node in range(5):
        for number in range(20):
            turns.put(f"n{node}-{number}", f"n{node}")
    await until(lambda: not len(turns), "all had their turn")
    assert most.pop("all") == 6 and set(most.values()) == {2}
    assert len(order) == len(set(order)) == 100
    assert len({container.partition("-")[0] for container in order[:20]}) == 5
    await tasks.close()


async def test_one_container_is_worked_on_once_at_a_time_and_again_when_it_was_put_in_meanwhile() -> None:
    tasks, gate, begun = Tasks("test"), asyncio.Event(), list[str]()

    async def work(container: str) -> None:
        begun.append(container)
        await gate.wait()
        if len(begun) == 2:
            raise ZeroDivisionError

    turns = Turns(work, tasks, together=4, on_a_node=4)
    turns.put("a", "n")
    await asyncio.sleep(0)
    for _ in range(3):
        turns.put("a", "n")
    assert begun == ["a"] and len(turns) == 1
    gate.set()
    await until(lambda: not len(turns), "all had their turn")
    assert begun == ["a", "a"], "a fault of its work does not stand in the way of the others"
    turns.put("b", "n")
    await asyncio.sleep(0)
    turns.close()
    turns.put("c", "n")
    await tasks.close()
    assert begun == ["a", "a", "b"]
