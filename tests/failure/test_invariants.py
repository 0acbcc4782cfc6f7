"""Breaking what must hold is caught: each invariant is broken on purpose, on a fleet of real processes."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.states import Status
from tests.failure import scenarios
from tests.failure.fleet import ProcessFleet, process_fleet
from tests.failure.invariants import (
    check_ends,
    check_flat,
    check_rows,
    check_transfers,
    check_whole,
    settled,
    slope,
)
from tests.failure.processes import Process, until
from tests.failure.report import Report
from tests.failure.scenarios import SCENARIOS, SOURCE, TARGET

pytestmark = [pytest.mark.failure, pytest.mark.xdist_group("invariants")]


class Stage:
    """A fleet with a container on each node, and the operations that made them."""

    def __init__(self, fleet: ProcessFleet) -> None:
        self.fleet = fleet
        self.here, self.there = "here", "there"
        self.accepted = []
        for container, node in ((self.here, SOURCE), (self.there, TARGET)):
            body = {"source": scenarios.EMPTY, "node": node, "start": True}
            self.accepted.append(str(fleet.done("POST", f"/1.0/vz/{container}", body)["id"]))
        steps = [("create/do", "container.create"), ("start/do", "container.start")]
        self.expected = dict.fromkeys(self.accepted, steps)

    def found(self) -> list[str]:
        """What does not hold now, without waiting for it to become good."""
        return settled(self.fleet, self.accepted, self.expected, settle=0.0)

    def caught(self, *invariants: str) -> None:
        """Just these invariants are found broken."""
        found = self.found()
        assert {each.partition(":")[0] for each in found} == set(invariants), found

    def file(self, name: str, node: str = SOURCE) -> Path:
        """A file of a fake node."""
        return self.fleet.state(node) / "fake" / name


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """One for all tests, which put back what they broke."""
    with process_fleet(2) as fleet:
        made = Stage(fleet)
        assert settled(fleet, made.accepted, made.expected) == []
        yield made
        assert made.found() == []


@contextmanager
def changed(file: Path, change: Callable[[str], str]) -> Iterator[None]:
    """A file says something else within the block."""
    before = file.read_text()
    file.write_text(change(before))
    try:
        yield
    finally:
        file.write_text(before)


@contextmanager
def extra(file: Path) -> Iterator[None]:
    """A file is there within the block."""
    file.write_text("left behind")
    try:
        yield
    finally:
        file.unlink()


def of_world(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    """A change of the containers in a `world.json`."""

    def apply(text: str) -> str:
        world = json.loads(text)
        change(world["containers"])
        return json.dumps(world)

    return apply


def test_a_lost_operation_is_caught(stage: Stage) -> None:
    stage.accepted.append("00000000-0000-0000-0000-000000000000")
    try:
        stage.caught("I1")
    finally:
        stage.accepted.pop()


def test_an_operation_without_an_end_or_a_reason_is_caught() -> None:
    ended = {"status": "Failure", "status_code": 400, "err": "a reason", "description": ""}
    assert check_ends(["a"], {"a": ended}) == []
    assert len(check_ends(["a"], {"a": {**ended, "err": ""}})) == 1
    assert len(check_ends(["a"], {"a": {**ended, "status": "Running", "status_code": 103}})) == 1


def test_an_effect_twice_or_never_is_caught(stage: Stage) -> None:
    with changed(stage.file("effects"), lambda text: text + text.splitlines(keepends=True)[0]):
        stage.caught("I2")
    with changed(stage.file("effects"), lambda text: "".join(text.splitlines(keepends=True)[1:])):
        stage.caught("I2")


def test_a_container_that_runs_twice_is_caught(stage: Stage) -> None:
    twin = stage.fleet.world(SOURCE)["containers"][stage.here]
    with changed(stage.file("world.json", TARGET), of_world(lambda there: there.update({stage.here: twin}))):
        stage.caught("I3", "I6")


@pytest.mark.parametrize(
    "change",
    ["DELETE FROM commands", "UPDATE commands SET result = NULL", "UPDATE commands SET acknowledged = 0"],
    ids=["forgotten", "unfinished", "unacknowledged"],
)
def test_a_journal_that_differs_is_caught(stage: Stage, change: str) -> None:
    fleet = stage.fleet
    fleet.agents[SOURCE].kill()
    journal = fleet.state(SOURCE) / "journal.db"
    with closing(sqlite3.connect(journal)) as database:
        rows = database.execute("SELECT * FROM commands").fetchall()
        database.execute(change)
        database.commit()
    stage.caught("I4")
    with closing(sqlite3.connect(journal)) as database:
        database.execute("DELETE FROM commands")
        database.executemany("INSERT INTO commands VALUES (?, ?, ?, ?, ?, ?)", rows)
        database.commit()
    fleet.start_agent(SOURCE)
    fleet.wait_online()


def test_a_container_that_nobody_lets_go_and_a_damaged_database_are_caught(stage: Stage, tmp_path: Path) -> None:
    copy = tmp_path / "controller.db"
    original = stage.fleet.settings.state / "controller.db"
    with closing(sqlite3.connect(original)) as live, closing(sqlite3.connect(copy)) as database:
        live.backup(database)
    assert check_rows(copy) == check_whole(copy) == []
    with closing(sqlite3.connect(copy)) as database:
        database.execute("UPDATE containers SET operation = ? WHERE id = ?", (stage.accepted[0], stage.here))
        database.execute("UPDATE containers SET phase = 'creating' WHERE id = ?", (stage.there,))
        database.execute("DELETE FROM events WHERE sequence = (SELECT max(sequence) - 1 FROM events)")
        database.commit()
    assert len(check_rows(copy)) == 3
    with closing(sqlite3.connect(copy)) as database:
        database.execute("PRAGMA writable_schema = ON")
        database.execute("UPDATE sqlite_master SET rootpage = rootpage + 1 WHERE name = 'containers'")
        database.commit()
    assert check_whole(copy)


def test_a_container_that_is_not_as_shown_is_caught(stage: Stage) -> None:
    def stop(containers: dict[str, Any]) -> None:
        containers[stage.here]["status"] = int(Status.STOPPED)

    with changed(stage.file("world.json"), of_world(stop)):
        stage.caught("I5")
    with changed(stage.file("world.json"), of_world(lambda containers: containers.pop(stage.here))):
        stage.caught("I5")


def test_what_a_transfer_keeps_is_caught() -> None:
    ended = {"status_code": 200, "kind": "container.move", "metadata": {}, "err": ""}
    worlds = {"n1": {"transfers": {"t": 0}}}
    assert check_transfers(worlds, {"t": ended}) != []
    assert check_transfers({"n1": {"transfers": {}}}, {"t": ended}) == []
    assert check_transfers(worlds, {"t": {**ended, "status_code": 103}}) == []
    assert check_transfers(worlds, {"t": {**ended, "metadata": {"left_behind": "n1 is lost"}}}) == []


def test_what_is_left_behind_is_caught(stage: Stage) -> None:
    half = {**stage.fleet.world(SOURCE)["containers"][stage.here], "status": int(Status.STOPPED)}
    with changed(stage.file("world.json"), of_world(lambda containers: containers.update(half=half))):
        stage.caught("I6")
    for file in (
        stage.file(".world.json.new"),
        stage.fleet.state(TARGET) / "images" / "fetched.part",
        stage.fleet.settings.state / "images" / "image-x",
    ):
        with extra(file):
            stage.caught("I6")


def test_growth_is_caught(tmp_path: Path) -> None:
    assert slope([5.0]) == 0.0
    assert slope([1.0, 3.0, 5.0]) == 2.0
    assert check_flat("memory", [100.0, 130.0, 90.0, 110.0, 100.0], most=10.0) == []
    assert check_flat("memory", [100.0, 108.0, 116.0, 124.0, 132.0], most=10.0)
    leaks = "import os, time\nwhile True: os.open('/dev/null', 0); time.sleep(0.005)"
    process = Process("leaks", [sys.executable, "-c", leaks], tmp_path / "log", {})
    figures = [5.0]
    try:
        while len(figures) < 10:
            until(lambda: process.descriptors() > figures[-1], "it opens one more")
            figures.append(float(process.descriptors()))
    finally:
        process.kill()
    assert check_flat("descriptors", figures, most=4.0)


# ---------------------------------------------------------------- the mechanisms taken away


def killed_after_it_started(fleet: ProcessFleet) -> tuple[str, str]:
    """A container that was started, and died when its agent had been killed before it told so; the operation's id."""
    container = scenarios.new_name()
    SCENARIOS["container.start"].prepare(fleet, container)
    agent = fleet.restart_agent(SOURCE, "agent/start/do/finished")
    identity = SCENARIOS["container.start"].ask(fleet, container).operation
    assert identity is not None
    assert agent.wait(20) == -9
    file = fleet.state(SOURCE) / "fake" / "world.json"
    world = json.loads(file.read_text())
    world["containers"][container] |= {"status": int(Status.STOPPED), "started_at": None}
    file.write_text(json.dumps(world))
    return container, identity


def test_without_the_journal_an_effect_happens_twice() -> None:
    with process_fleet(2) as fleet:
        for journal in (True, False):
            container, identity = killed_after_it_started(fleet)
            if not journal:
                (fleet.state(SOURCE) / "journal.db").unlink()
                for suffix in ("-wal", "-shm"):
                    (fleet.state(SOURCE) / f"journal.db{suffix}").unlink(missing_ok=True)
            fleet.start_agent(SOURCE)
            fleet.wait_online()
            found = settled(fleet, [identity], {identity: [("start/do", "container.start")]}, settle=2.0)
            twice = [each for each in found if each.startswith("I2")]
            assert bool(twice) is not journal, found
            scenarios.clean_up(fleet, container)


def test_without_the_commit_an_operation_is_lost() -> None:
    """The database is put back to what it was before the 202, as a disk does that lies about what it has written."""
    with process_fleet(2) as fleet:
        container = scenarios.new_name()
        SCENARIOS["container.start"].prepare(fleet, container)
        fleet.restart_controller("container.start/start/do/begin")
        fleet.wait_online()
        state = fleet.settings.state
        with closing(sqlite3.connect(state / "controller.db")) as live, closing(sqlite3.connect(state / "old")) as old:
            live.backup(old)
        answer = SCENARIOS["container.start"].ask(fleet, container)
        assert fleet.controller is not None
        assert fleet.controller.wait(20) == -9
        with closing(sqlite3.connect(state / "controller.db")) as database:
            (identity,) = database.execute("SELECT max(id) FROM operations").fetchone()
        assert answer.operation in (identity, None)
        for suffix in ("-wal", "-shm"):
            (state / f"controller.db{suffix}").unlink(missing_ok=True)
        shutil.move(state / "old", state / "controller.db")
        fleet.start_controller()
        fleet.wait_online()
        assert [each[:2] for each in settled(fleet, [identity], settle=0.0)] == ["I1"]


def test_a_report_with_a_violation_fails() -> None:
    report = Report("F0", faults=3, figures={"effects": 1200})
    report.raise_violations()
    report.check(True, "all is well")
    assert report.line == "F0: 3 faults, 0 violations, 1,200 effects"
    report.check(False, "I3: twice")
    with pytest.raises(pytest.fail.Exception, match="I3: twice"):
        report.raise_violations()
