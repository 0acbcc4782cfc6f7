"""F10: the write-ahead log of a controller that was killed is truncated, changed, deleted or replaced.

Whatever is done to it: either every commit that was answered is there, or the start says that commits are missing (and
is reconcile-only), or it refuses. Never does it go on in silence.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.errors import Unavailable
from controller.store import health
from controller.store.mark import Mark, Marked
from tests.failure.fleet import process_fleet
from tests.failure.processes import until
from tests.failure.report import Report
from tests.helpers.api import EMPTY

ROOT = Path(__file__).resolve().parents[2]
KILLS, KILLS_LONG = 6, 30
MUTATIONS = 50
"""For each kill; six kills give the 300 of the short run."""
FRAME = 24 + 4096
"""A page of the log with its header, after the log's own header of 32 bytes."""
DATABASE, LOG, MARK = "controller.db", "controller.db-wal", "store.mark"


@dataclass(frozen=True)
class Killed:
    """What a killed writer left: the files, what was answered, what is really there, an earlier copy of its log."""

    directory: Path
    answered: frozenset[str]
    committed: frozenset[str]
    earlier_log: bytes

    @property
    def log(self) -> bytes:
        return (self.directory / LOG).read_bytes()


def killed_writer(directory: Path, chance: random.Random) -> Killed:
    """Have a process commit rows, and kill it in the middle. What it told before its end was answered."""
    directory.mkdir()
    command = [sys.executable, "-m", "tests.failure.wal_writer", str(directory)]
    wanted, early = chance.randrange(40, 900), chance.randrange(5, 30)
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        answered: list[bytes] = []
        earlier = b""
        for line in process.stdout:
            answered.append(line)
            if len(answered) == early:
                earlier = (directory / LOG).read_bytes()
            if len(answered) == wanted:
                process.kill()
    assert process.returncode == -9, "it ended before it was killed"
    whole = frozenset(line.decode().strip() for line in answered if line.endswith(b"\n"))
    assert len(whole) >= wanted
    return Killed(directory, whole, frozenset(rows(directory)), earlier)


def rows(directory: Path) -> set[str]:
    """The names in the database, its log applied."""
    connection = sqlite3.connect(f"file:{directory / DATABASE}?mode=ro", uri=True)
    try:
        return {str(row[0]) for row in connection.execute("SELECT name FROM tokens")}
    finally:
        connection.close()


# ---------------------------------------------------------------- what is done to a log

Mutation = Callable[[Path, Killed, Killed, random.Random], None]


def _truncate(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    log.write_bytes(killed.log[: chance.randrange(len(killed.log))])


def _truncate_at_a_frame(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    frames = (len(killed.log) - 32) // FRAME
    log.write_bytes(killed.log[: 32 + FRAME * chance.randrange(frames)])


def _flip(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    content = bytearray(killed.log)
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    log.write_bytes(content)


def _zero(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    content = bytearray(killed.log)
    at, length = chance.randrange(len(content)), chance.randrange(1, 3 * FRAME)
    content[at : at + length] = bytes(len(content[at : at + length]))
    log.write_bytes(content)


def _swap_frames(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    content = bytearray(killed.log)
    frames = (len(content) - 32) // FRAME
    one, two = (32 + FRAME * chance.randrange(frames) for _ in range(2))
    content[one : one + FRAME], content[two : two + FRAME] = content[two : two + FRAME], content[one : one + FRAME]
    log.write_bytes(content)


def _delete(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    log.unlink()


def _earlier(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    log.write_bytes(killed.earlier_log)


def _of_another(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    log.write_bytes(other.log)


def _append(log: Path, killed: Killed, other: Killed, chance: random.Random) -> None:
    log.write_bytes(killed.log + chance.randbytes(chance.randrange(1, 2 * FRAME)))


MUTATIONS_OF_ALL_KINDS: tuple[Mutation, ...] = (
    *[_truncate, _truncate_at_a_frame, _flip, _zero] * 3,
    *(_swap_frames, _delete, _earlier, _of_another, _append),
)


# ---------------------------------------------------------------- what the start makes of it


def judge(report: Report, directory: Path, killed: Killed, name: str) -> None:
    """Ask what the start asks, and compare it with what is really there."""
    report.faults += 1
    url = f"sqlite:///{directory / DATABASE}"
    try:
        lost = health.examine(url, Mark(directory / MARK))
    except Unavailable as refusal:
        report.check("restore a backup" in refusal.text, f"{name}: a refusal does not say what to do: {refusal.text}")
        report.figures["refused"] += 1
        return
    there = rows(directory)
    if lost is None:
        missing = killed.answered - there
        report.check(not missing, f"{name}: {len(missing)} answered commits are gone, and nothing is said")
        report.figures["whole"] += 1
    else:
        report.check(killed.committed - there, f"{name}: commits are said to be missing, and none is: {lost}")
        report.figures["reconcile-only"] += 1


def run(report: Report, directory: Path, kills: int, seed: int) -> None:
    """Mutate the logs of so many killed writers."""
    chance = random.Random(seed)
    report.figures |= {"reconcile-only": 0, "refused": 0, "whole": 0}
    other = killed_writer(directory / "other", chance)
    for number in range(kills):
        killed = killed_writer(directory / f"killed-{number}", chance)
        for mutation in range(MUTATIONS):
            mutate = MUTATIONS_OF_ALL_KINDS[mutation % len(MUTATIONS_OF_ALL_KINDS)]
            copy = directory / "copy"
            shutil.copytree(killed.directory, copy)
            mutate(copy / LOG, killed, other, chance)
            judge(report, copy, killed, f"seed {seed}, kill {number}, mutation {mutation} ({mutate.__name__})")
            shutil.rmtree(copy)
        shutil.rmtree(killed.directory)


@pytest.mark.failure("F10")
def test_no_damage_of_the_log_goes_unnoticed(report: Report, tmp_path: Path, long_run: bool) -> None:
    run(report, tmp_path, KILLS_LONG if long_run else KILLS, seed=random.randrange(2**32))
    assert report.figures["reconcile-only"], "no mutation lost anything: the test proves nothing"
    assert report.figures["whole"], "no mutation was harmless: a false alarm would not be seen"


def test_lost_commits_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the numbers, damage is what SQLite makes of it: a shorter log, and not a word."""
    tampered = Report("F10, broken")
    monkeypatch.setattr(health, "missing_commits", lambda number, marked: None)
    run(tampered, tmp_path, kills=1, seed=1)
    assert any("nothing is said" in violation for violation in tampered.violations)


def test_false_alarms_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tampered = Report("F10, broken")
    monkeypatch.setattr(health, "missing_commits", lambda number, marked: "so they say")
    run(tampered, tmp_path, kills=1, seed=1)
    assert any("none is" in violation for violation in tampered.violations)


@pytest.mark.parametrize(
    ("number", "marked", "said"),
    [
        (None, None, None),
        (5, Marked(5, True), None),
        (6, Marked(5, False), None),
        (5, None, "mark of the last commit is missing"),
        (4, Marked(5, False), "1 commits are missing"),
        (None, Marked(5, False), "all commits are missing"),
        (5 + 2 * health.AHEAD_AT_MOST, Marked(5, False), "of another controller"),
    ],
)
def test_what_the_numbers_say(number: int | None, marked: Marked | None, said: str | None) -> None:
    found = health.missing_commits(number, marked)
    assert found is None if said is None else found is not None and said in found


def test_a_mark_survives_a_torn_write(tmp_path: Path) -> None:
    mark = Mark(tmp_path / MARK)
    assert mark.read() is None
    mark.open(7)
    mark.advance(8)
    assert mark.read() == Marked(8, False)
    mark.close()
    assert mark.read() == Marked(8, True)
    content = bytearray((tmp_path / MARK).read_bytes())
    newest = max((0, 512), key=lambda slot: int.from_bytes(content[slot + 8 : slot + 16], "little"))
    content[newest + 20] ^= 1
    (tmp_path / MARK).write_bytes(content)
    assert mark.read() == Marked(8, False), "the slot before is whole"
    (tmp_path / MARK).write_bytes(b"")
    assert mark.read() is None


@pytest.mark.parametrize("damage", ["the log is gone", "its end is gone"])
def test_a_killed_controller_whose_log_is_damaged_only_reconciles(damage: str) -> None:
    """The whole way: what was answered with 202 and lost is said, refused, and found again on the node."""
    with process_fleet(nodes=2) as fleet:
        assert fleet.controller is not None
        fleet.done("POST", "/1.0/vz/before", {"source": EMPTY, "node": "node1"})
        for number in range(5):
            body = {"source": EMPTY, "node": "node1", "start": True}
            fleet.done("POST", f"/1.0/vz/lost{number}", body)
        fleet.controller.kill()
        fleet.agents["node2"].kill()
        log = fleet.settings.state / LOG
        if damage == "the log is gone":
            log.unlink()
        else:
            log.write_bytes(log.read_bytes()[: -30 * FRAME])
        fleet.start_controller()
        fleet.wait_online("node1")
        shown = fleet.call("GET", "/1.0/reconciliation").metadata
        assert shown["active"] and shown["awaited"] == ["node2"] and "commits are missing" in shown["reason"]
        refused = fleet.request("POST", "/1.0/vz/new", {"source": EMPTY})
        assert refused.code == 503 and refused.metadata["code"] == "unavailable"
        assert fleet.call("GET", "/1.0/vz").code == 200
        fleet.start_agent("node2")
        until(lambda: not fleet.call("GET", "/1.0/reconciliation").metadata["active"], "all have told what they have")
        # What the row is gone of stands on its node, unmanaged, and runs.
        node = fleet.call("GET", "/1.0/nodes/node1").metadata
        assert "lost4" in str(node["unmanaged"])
        assert "commits are missing" in fleet.controller.log.read_text()
        fleet.done("POST", "/1.0/vz/new", {"source": EMPTY, "node": "node1"})
