"""The journal: what it has said to keep is kept, through restarts, kills and a full disk."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent import journal as journal_module
from agent.admission import Fences, Refuse, Run, decide, outdated
from agent.journal import Journal
from common.clock import ManualClock
from common.commands import DropImage, RenameContainer, StartContainer
from common.errors import NoSpace, Unavailable
from common.messages import Command, Outcome, Result
from common.reports import ContainerSpec, WireError

DAY = 24 * 3600


def command(number: int, container: str = "101", generation: int = 1, epoch: int = 1) -> Command:
    return Command(f"op/{number}/do", epoch, "s", generation, 1e9, StartContainer(container))


@asynccontextmanager
async def opened(path: Path, clock: ManualClock | None = None) -> AsyncIterator[Journal]:
    journal = Journal(path / "journal.db", clock or ManualClock())
    await journal.open()
    try:
        yield journal
    finally:
        await journal.close()


async def test_what_was_begun_and_done_is_found_by_the_next_run(tmp_path: Path) -> None:
    done = Result("op/1/do", outcome=Outcome(bytes=7), sampled_at=1.5)
    failed = Result("op/2/do", error=WireError("driver-failed", "lxc-start said no"))
    async with opened(tmp_path) as journal:
        assert await journal.find("op/1/do") is None
        for number in (1, 2, 3):
            await journal.begin(command(number, generation=number, epoch=number))
        await journal.finish(done)
        await journal.finish(failed)
    async with opened(tmp_path) as journal:
        found = [await journal.find(f"op/{number}/do") for number in (1, 2, 3)]
        assert [record and record.result for record in found] == [done, failed, None]
        assert found[2] is not None
        assert (journal.epoch, journal.generations) == (3, {"101": 3})
        assert await journal.unacknowledged() == [done, failed]
        await journal.acknowledge(["op/1/do", "op/nobody/do"])
        assert await journal.unacknowledged() == [failed]


async def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    async with opened(tmp_path):
        assert (tmp_path / "journal.db").stat().st_mode & 0o077 == 0


async def test_begin_twice_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.begin(command(1))
        await journal.finish(Result("op/1/do", outcome=Outcome()))
        await journal.begin(command(1))
        record = await journal.find("op/1/do")
        assert record is not None
        assert record.result == Result("op/1/do", outcome=Outcome())


async def test_epoch_and_generation_never_go_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.begin(command(1, generation=5, epoch=7))
        await journal.begin(command(2, generation=2, epoch=3))
        await journal.see_epoch(6)
    async with opened(tmp_path) as journal:
        assert (journal.epoch, journal.generations) == (7, {"101": 5})
        await journal.see_epoch(9)
    async with opened(tmp_path) as journal:
        assert journal.epoch == 9


async def test_a_rename_counts_for_both_names_and_an_image_for_none(tmp_path: Path) -> None:
    spec = ContainerSpec("b", 4, "h", "00:16:3e:00:00:01", {})
    async with opened(tmp_path) as journal:
        await journal.begin(Command("op/1/do", 1, "s", 4, 1.0, RenameContainer("a", spec)))
        await journal.begin(Command("op/2/do", 1, "s", 9, 1.0, DropImage("0" * 64)))
        assert journal.generations == {"a": 4, "b": 4}


async def test_a_name_of_a_younger_container_that_is_gone_can_be_given_again(tmp_path: Path) -> None:
    rename = Command(
        "op/2/do", 1, "s", 4, 1.0, RenameContainer("a", ContainerSpec("b", 4, "h", "00:16:3e:00:00:01", {}))
    )
    async with opened(tmp_path) as journal:
        await journal.begin(command(1, "b", generation=9))
        assert isinstance(decide(rename, None, Fences("s", 1, journal.generations), 0.0), Run)
        await journal.begin(rename)
        assert journal.generations == {"a": 4, "b": 4}
        after = command(3, "b", generation=4)
        assert outdated(after, Fences("s", 1, journal.generations)) is None
        # The container itself is guarded still.
        await journal.begin(command(4, "a", generation=5))
        assert isinstance(decide(rename, None, Fences("s", 1, journal.generations), 0.0), Refuse)
    async with opened(tmp_path) as journal:
        assert journal.generations == {"a": 5, "b": 4}


async def test_many_at_once_are_all_kept(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await asyncio.gather(*(journal.begin(command(n, f"c{n}")) for n in range(500)))
        await asyncio.gather(*(journal.finish(Result(f"op/{n}/do", outcome=Outcome())) for n in range(500)))
        assert len(await journal.unacknowledged()) == 500


async def test_old_acknowledged_commands_are_forgotten_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "KEEP_IDS", 2)
    clock = ManualClock()
    async with opened(tmp_path, clock) as journal:

        async def there() -> list[int]:
            return [n for n in range(1, 6) if await journal.find(f"op/{n}/do") is not None]

        for number in (1, 2, 3, 4, 5):
            await journal.begin(command(number))
            await journal.finish(Result(f"op/{number}/do", outcome=Outcome()))
        await journal.acknowledge(["op/1/do", "op/3/do", "op/5/do"])
        clock.advance(6 * DAY)
        await journal.prune()
        assert await there() == [1, 2, 3, 4, 5], "nothing is forgotten within seven days"
        clock.advance(2 * DAY)
        await journal.prune()
        assert await there() == [2, 4, 5], "what is not acknowledged, and the last ids, stay"
        clock.advance(30 * DAY)
        await journal.prune()
        assert await there() == [4, 5]


async def test_one_failing_job_of_a_group_fails_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:

        def fails(_database: sqlite3.Connection) -> None:
            raise LookupError("mine")

        results = await asyncio.gather(
            journal.begin(command(1)), journal._run(fails), journal.begin(command(2)), return_exceptions=True
        )
        assert [type(result) for result in results] == [type(None), LookupError, type(None)]
        assert await journal.find("op/1/do") is not None
        assert await journal.find("op/2/do") is not None


async def test_a_full_disk_is_told_and_passes(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        pages = await journal._run(lambda database: database.execute("PRAGMA page_count").fetchone()[0])
        await journal._run(lambda database: database.execute(f"PRAGMA max_page_count = {pages}").fetchall())
        kept = 0
        with pytest.raises(NoSpace):
            for number in range(2000):
                await journal.begin(command(number))
                kept += 1
        assert await journal.find(f"op/{kept}/do") is None, "what could not be kept is not there"
        assert await journal.find("op/0/do") is not None, "reading goes on"
        await journal._run(lambda database: database.execute("PRAGMA max_page_count = 100000").fetchall())
        await journal.begin(command(kept))
        assert await journal.find(f"op/{kept}/do") is not None


async def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"this is no database" * 100)
    journal = Journal(tmp_path / "journal.db", ManualClock())
    with pytest.raises(Unavailable, match=r"journal\.db"):
        await journal.open()
    await journal.close()


async def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        pass
    with pytest.raises(Unavailable):
        await journal.find("op/1/do")
    await journal.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from agent.admission import Fences, Refuse, Run, decide, outdated
from agent.journal import Journal
from common.clock import SystemClock
from common.commands import StartContainer
from common.messages import Command

async def main():
    journal = Journal(Path(sys.argv[1]), SystemClock())
    await journal.open()
    number = 0
    while True:
        await journal.begin(Command(f"op/{number}/do", 1, "s", 1, 1.0, StartContainer("101")))
        print(number, flush=True)
        number += 1

asyncio.run(main())
"""


def write_and_kill(path: Path) -> list[int]:
    """The numbers of the commands which a process says to have begun before it was killed."""
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(200)]
        os.kill(writer.pid, signal.SIGKILL)
        return told + [int(line) for line in writer.stdout.read().split()]


async def test_what_was_begun_survives_a_kill(tmp_path: Path) -> None:
    told = await asyncio.to_thread(write_and_kill, tmp_path / "journal.db")
    async with opened(tmp_path) as journal:
        found = [await journal.find(f"op/{number}/do") for number in told]
        assert None not in found
