"""The executor: what is run, what is answered, what is refused, in which order, and what the controller hears."""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from agent.checks import check_arguments
from agent.drivers.fake_state import Fault
from agent.executor import allowed_time
from agent.handlers import HANDLERS
from common.commands import (
    COMMANDS,
    CopyContainer,
    CreateContainer,
    CreateSnapshot,
    DeleteContainer,
    DeleteSnapshot,
    EndTransfer,
    EnsureImage,
    FreezeContainer,
    ReceiveContainer,
    RenameContainer,
    RenameSnapshot,
    RestoreSnapshot,
    Route,
    SendContainer,
    StartContainer,
    StopContainer,
    UnfreezeContainer,
    UpdateContainer,
    target_of,
)
from common.errors import NoSpace, Unavailable, VzfleetError
from common.messages import Accepted, Outcome, Progress, Result, StateChanged
from common.reports import ImageSpec
from common.states import Status
from tests.helpers.agent_parts import EPOCH, SESSION, agent_parts, spec

CREATE = CreateContainer(spec(), None)
START, STOP = StartContainer("101"), StopContainer("101", 5.0)


def test_every_command_has_a_handler() -> None:
    assert HANDLERS.keys() == COMMANDS.keys()


async def test_a_command_is_accepted_run_and_answered(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        created = await parts.do("op/1/do", CREATE)
        assert created.error is None
        assert created.outcome is not None
        assert created.outcome.container is not None
        assert created.outcome.container.status == Status.STOPPED
        started = await parts.do("op/2/do", START)
        assert started.outcome is not None
        assert started.outcome.container is not None
        assert started.outcome.container.status == Status.RUNNING
        assert started.outcome.sample is not None
        assert started.outcome.sample.memory_usage
        assert started.sampled_at == parts.clock.now().timestamp()
        assert [type(m) for m in parts.sent] == [Accepted, Result, Accepted, Result]
        assert parts.effects() == ["container.create 101 op/1/do", "container.start 101 op/2/do"]


async def test_the_whole_life_of_a_container(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        life = [
            (CREATE, Status.STOPPED),
            (START, Status.RUNNING),
            (FreezeContainer("101"), Status.FROZEN),
            (UnfreezeContainer("101"), Status.RUNNING),
            (UpdateContainer(spec(limits_memory="64MiB")), Status.RUNNING),
            (CreateSnapshot("101", "before"), Status.RUNNING),
            (STOP, Status.STOPPED),
            (RestoreSnapshot("101", "before"), Status.STOPPED),
            (DeleteSnapshot("101", "before"), Status.STOPPED),
            (CopyContainer(spec("102"), "101"), Status.STOPPED),
            (RenameContainer("101", spec("103")), Status.STOPPED),
        ]
        for number, (arguments, status) in enumerate(life):
            result = await parts.do(f"op/{number}/do", arguments)
            assert result.error is None, arguments
            assert result.outcome is not None
            assert result.outcome.container is not None
            assert result.outcome.container.status == status, arguments
        assert (await parts.do("op/20/do", DeleteContainer("103", 1))).error is None
        assert {report.id for report in await parts.driver.containers()} == {"102"}


async def test_a_finished_command_is_answered_from_the_journal(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        first = await parts.do("op/1/do", CREATE)
        again = await parts.do("op/1/do", CREATE)
        # How it ended; the state of then is nothing to go by, and the inventory has told that of now.
        assert first.error is again.error is None and again.outcome == Outcome()
        # Even where it would be refused if it were new: the truth about what happened does not expire.
        assert await parts.do("op/1/do", CREATE, expires_at=0.0, session="older", epoch=1) == again
        assert len(parts.effects()) == 1


async def test_a_running_command_is_only_accepted_again(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        parts.driver.script.delays["container.create"] = 0.3
        parts.executor.receive(parts.command("op/1/do", CREATE))
        await parts.until(lambda: Accepted("op/1/do") in parts.sent)
        parts.executor.receive(parts.command("op/1/do", CREATE))
        await parts.result("op/1/do")
        assert parts.sent.count(Accepted("op/1/do")) == 2
        assert len(parts.effects()) == 1


async def test_a_command_delivered_twice_at_once_runs_once(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        for _ in range(5):
            parts.executor.receive(parts.command("op/1/do", CREATE))
        await parts.result("op/1/do")
        await parts.do("op/2/do", START)
        assert len(parts.effects()) == 2
        assert sum(isinstance(m, Result) for m in parts.sent) == 2


async def test_what_was_begun_before_a_restart_is_run_again_when_it_comes_again(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        await parts.do("op/1/do", CREATE)
        parts.driver.script.delays["container.start"] = 60
        parts.executor.receive(parts.command("op/2/do", START))
        await parts.until(lambda: Accepted("op/2/do") in parts.sent)
    async with agent_parts(tmp_path) as parts:
        assert [m.command for m in parts.sent if isinstance(m, Result)] == ["op/1/do"]
        result = await parts.do("op/2/do", START)
        assert result.error is None
        assert parts.effects() == ["container.create 101 op/1/do", "container.start 101 op/2/do"]


async def test_results_are_told_again_until_they_are_acknowledged(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        results = [await parts.do("op/1/do", CREATE), await parts.do("op/2/do", START)]
    async with agent_parts(tmp_path) as parts:
        assert all(result.outcome is not None and result.outcome.container is not None for result in results)
        assert parts.sent == [Result("op/1/do", outcome=Outcome()), Result("op/2/do", outcome=Outcome())]
        parts.executor.acknowledged(("op/1/do",))
        await parts.do("op/3/do", STOP)
        parts.sent.clear()
        await parts.executor.begin_session(SESSION, EPOCH)
        assert [m.command for m in parts.sent if isinstance(m, Result)] == ["op/2/do", "op/3/do"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"session": "another"}, "session"),
        ({"epoch": EPOCH - 1}, "epoch"),
        ({"expires_at": 1000.0}, "expired"),
        ({"expires_at": float("nan")}, "expired"),
        ({"generation": 2}, "generation"),
    ],
)
async def test_a_stale_command_never_runs(tmp_path: Path, changed: dict[str, object], reason: str) -> None:
    async with agent_parts(tmp_path) as parts:
        await parts.do("op/1/do", CreateContainer(spec(generation=3), None), generation=3)
        result = await parts.do("op/2/do", START, **{"generation": 3, **changed})
        assert result.error is not None
        assert result.error.code == "stale"
        assert reason in result.error.text
        assert len(parts.effects()) == 1
        assert Accepted("op/2/do") not in parts.sent
        assert await parts.journal.find("op/2/do") is None


async def test_the_highest_epoch_and_generation_outlive_a_restart(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        await parts.do("op/1/do", CreateContainer(spec(generation=4), None), generation=4, epoch=9)
    async with agent_parts(tmp_path) as parts:
        older = await parts.do("op/2/do", START, generation=4, epoch=8)
        lower = await parts.do("op/3/do", START, generation=3, epoch=9)
        assert [older.error and older.error.code, lower.error and lower.error.code] == ["stale", "stale"]
        assert (await parts.do("op/4/do", START, generation=4, epoch=9)).error is None


async def test_an_accepted_command_may_wait_for_its_turn_past_its_expiry(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        await parts.do("op/1/do", CREATE)
        parts.driver.script.delays["container.start"] = 0.2
        parts.executor.receive(parts.command("op/2/do", START))
        parts.executor.receive(parts.command("op/3/do", STOP, expires_at=parts.clock.monotonic() + 1))
        await parts.until(lambda: Accepted("op/3/do") in parts.sent)
        parts.clock.advance(2)
        assert (await parts.result("op/2/do")).error is None
        assert (await parts.result("op/3/do")).error is None
        assert parts.effects()[-1] == "container.stop 101 op/3/do"


async def test_one_container_one_command_at_a_time_in_order(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        parts.driver.script.delays = {"container.create": 0.1, "container.start": 0.05}
        for number, arguments in enumerate([CREATE, START, STOP, DeleteContainer("101", 1)]):
            parts.executor.receive(parts.command(f"op/{number}/do", arguments))
        await parts.result("op/3/do")
        assert [line.split()[0] for line in parts.effects()] == [
            "container.create",
            "container.start",
            "container.stop",
            "container.delete",
        ]


async def test_different_containers_run_at_once_up_to_a_bound(tmp_path: Path) -> None:
    async with agent_parts(tmp_path, parallel=3) as parts:
        parts.driver.script.delays["container.create"] = 0.2
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number in range(6):
            parts.executor.receive(parts.command(f"op/{number}/do", CreateContainer(spec(f"c{number}"), None)))
        await asyncio.gather(*(parts.result(f"op/{number}/do") for number in range(6)))
        assert 0.4 <= loop.time() - began < 1.0


async def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with agent_parts(tmp_path) as parts:
        monkeypatch.setattr(parts.driver, "create", full)
        result = await parts.do("op/1/do", CREATE)
    assert result.error is not None
    assert result.error.code == "no-space"


async def test_errors_cross_as_codes_and_faults_as_internal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with agent_parts(tmp_path) as parts:
        missing = await parts.do("op/1/do", START)
        assert missing.error is not None
        assert missing.error.code == "not-found"
        parts.driver.script.faults = [
            Fault("container.create", code="unsupported", text="no disk limits here"),
            Fault("container.create", code="crash", text="secret of the inside"),
        ]
        refused = await parts.do("op/2/do", CREATE)
        assert refused.error is not None
        assert (refused.error.code, refused.error.text) == ("unsupported", "no disk limits here")
        with caplog.at_level(logging.ERROR):
            crashed = await parts.do("op/3/do", CREATE)
        assert crashed.error is not None
        assert crashed.error.code == "internal"
        assert "secret" not in crashed.error.text
        assert any(record.exc_info for record in caplog.records)


def route(**changes: Any) -> Route:
    """A way that may be gone, but for the changes."""
    fields: dict[str, Any] = {
        "transfer": "t-1",
        "round": 0,
        "peer": "n2",
        "peer_key": "0" * 40,
        "token": "t",
        "address": "tcp://[fe80::1]:8445",
    }
    return Route(**(fields | changes))


def sending(**changes: Any) -> SendContainer:
    return SendContainer("101", route(**changes), "btrfs", last=False, moving=True)


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:1", "tcp://[::1]:65535", "tcp://node-2.example.org:8445"])
def test_addresses_of_other_nodes(address: str) -> None:
    check_arguments(sending(address=address))
    check_arguments(sending(address=None, relay="/1.0/x", relay_put="p", relay_get="g", rate=10_000))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (StartContainer("../../etc"), "container"),
        (StartContainer(""), "container"),
        (StopContainer("101", float("nan")), "timeout"),
        (StopContainer("101", -1.0), "timeout"),
        (CreateSnapshot("101", "a/b"), "snapshot"),
        (RenameSnapshot("101", "a", "../b"), "new"),
        (CreateContainer(spec("a b"), None), "spec.id"),
        (CreateContainer(spec(), "../image"), "image"),
        (CreateContainer(spec(environment_X="1\nlxc.hook.pre-start = touch /x"), None), "spec.config.environment.X"),
        (UpdateContainer(spec(raw_lxc="1")), "spec.config.raw.lxc"),
        (CopyContainer(spec(), "-rf"), "source"),
        (sending(transfer="../../etc"), "route.transfer"),
        (sending(transfer=""), "route.transfer"),
        (sending(round=10**6), "route.round"),
        (sending(peer="a b"), "route.peer"),
        (sending(peer_key="short"), "route.peer_key"),
        (sending(token="t\r\nX: y"), "route.token"),
        (sending(address=None), "route"),
        (sending(relay="/x", relay_put="p", relay_get="g"), "route"),
        (sending(address="ipc:///etc/passwd"), "route.address"),
        (sending(address="tcp://10.0.0.1;10.0.0.2:80"), "route.address"),
        (sending(address="tcp://host:99999"), "route.address"),
        (sending(address="tcp://*:80"), "route.address"),
        (sending(address=None, relay="/x HTTP/1.1\r\nHost: evil", relay_put="p", relay_get="g"), "route.relay"),
        (sending(address=None, relay="/x", relay_put="p\r\nX: y", relay_get="g"), "route.relay_put"),
        (sending(address=None, relay="/x", relay_put="p", relay_get=""), "route.relay_get"),
        (sending(rate=0), "route.rate"),
        (SendContainer("-rf", route(), "files", last=True, moving=True), "container"),
        (SendContainer("101", route(), "tar", last=True, moving=True), "format"),
        (SendContainer("101", route(), "files", last=True, moving=False, snapshot="a/b"), "snapshot"),
        (ReceiveContainer(spec("a b"), route(), "files", last=True), "spec.id"),
        (ReceiveContainer(spec(), route(transfer="a.b"), "files", last=True), "route.transfer"),
        (EndTransfer("101", "../snapshots"), "transfer"),
        (EndTransfer("a/b", "t"), "container"),
        (EnsureImage(ImageSpec("0" * 63, "rootfs", 1, "/x", "t")), "image.fingerprint"),
        (EnsureImage(ImageSpec("0" * 64, "iso", 1, "/x", "t")), "image.layout"),
        (EnsureImage(ImageSpec("0" * 64, "rootfs", 2**60, "/x", "t")), "image.size"),
    ],
)
async def test_hostile_arguments_never_reach_the_driver(tmp_path: Path, arguments: object, field: str) -> None:
    async with agent_parts(tmp_path) as parts:
        result = await parts.do("op/1/do", arguments)  # type: ignore[arg-type]
        assert result.error is not None
        assert (result.error.code, result.error.field) == ("invalid", field)
        assert parts.effects() == []


async def test_a_full_disk_refuses_the_command_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent_parts(tmp_path) as parts:

        async def full(*_: object) -> None:
            raise NoSpace("full")

        with monkeypatch.context() as patch:
            patch.setattr(parts.journal, "begin", full)
            result = await parts.do("op/1/do", CREATE)
        assert result.error is not None
        assert result.error.code == "no-space"
        assert parts.effects() == []
        # Its operation may have gone on since: a copy of it that comes late does not run.
        assert await parts.do("op/1/do", CREATE) == result
        await parts.executor.begin_session(SESSION, EPOCH)
        assert (await parts.do("op/1/do", CREATE)).error is None


@pytest.mark.parametrize("why", [NoSpace("full"), Unavailable("disk I/O error")])
async def test_a_result_is_not_told_before_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: VzfleetError
) -> None:
    async with agent_parts(tmp_path) as parts:
        keep, tries = parts.journal.finish, 0

        async def full_once(result: Result) -> None:
            nonlocal tries
            tries += 1
            if tries == 1:
                assert not any(isinstance(m, Result) for m in parts.sent)
                raise why
            await keep(result)

        monkeypatch.setattr(parts.journal, "finish", full_once)
        assert (await parts.do("op/1/do", CREATE)).error is None
        assert tries == 2


async def test_begin_is_on_disk_before_the_driver_is_touched(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        seen: list[int] = []
        reach = parts.driver.create

        async def create(*arguments: object) -> None:
            with sqlite3.connect(tmp_path / "journal.db") as other:
                query = "SELECT count(*) FROM commands WHERE id = 'op/1/do' AND result IS NULL"
                seen.append(other.execute(query).fetchone()[0])
            other.close()
            await reach(*arguments)  # type: ignore[arg-type]

        parts.driver.create = create  # type: ignore[method-assign,assignment]
        await parts.do("op/1/do", CREATE)
        assert seen == [1]


async def test_a_command_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.executor.allowed_time", lambda _command: 0.1)
    async with agent_parts(tmp_path) as parts:
        parts.driver.script.delays["container.create"] = 30
        result = await parts.do("op/1/do", CREATE)
        assert result.error is not None
        assert result.error.code == "deadline-passed"
        assert parts.effects() == []


async def test_a_stop_adds_its_own_time(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        assert allowed_time(parts.command("a", STOP)) == 125
        assert allowed_time(parts.command("a", START)) == 120
        assert allowed_time(parts.command("a", FreezeContainer("101"))) == 30
        assert target_of(STOP) == "101"


async def test_progress_is_told_twice_a_second_at_most(tmp_path: Path) -> None:
    from agent.progress import ProgressReporter

    async with agent_parts(tmp_path) as parts:
        report = ProgressReporter("op/1/do", parts.clock, parts.sent.append)
        for percent in range(100):
            report.transferred("fetching", percent, 100)
            parts.clock.advance(0.05)
        told = [m for m in parts.sent if isinstance(m, Progress)]
        assert len(told) == 10
        assert (told[0].percent, told[-1].stage) == (0, "fetching")
        assert told[-1].speed == pytest.approx(20, abs=2)


async def test_a_closed_executor_leaves_the_command_begun(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        parts.driver.script.delays["container.create"] = 60
        parts.executor.receive(parts.command("op/1/do", CREATE))
        await parts.until(lambda: Accepted("op/1/do") in parts.sent)
        await parts.executor.close()
        record = await parts.journal.find("op/1/do")
        assert record is not None
        assert record.result is None
        assert parts.effects() == []


async def test_a_command_that_is_given_up_ends_at_once_and_stays_so(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        parts.driver.script.delays["container.create"] = 60
        parts.executor.receive(parts.command("op/1/do", CREATE))
        parts.executor.receive(parts.command("op/2/do", START))
        await parts.until(lambda: Accepted("op/2/do") in parts.sent)
        parts.executor.abandon("op/2/do")  # it still waits for its turn
        parts.executor.abandon("op/1/do")
        results = [await parts.result("op/1/do"), await parts.result("op/2/do")]
        assert [result.error and result.error.code for result in results] == ["cancelled", "cancelled"]
        assert parts.effects() == []
        parts.driver.script.delays.clear()
        assert await parts.do("op/1/do", CREATE) == results[0]
        parts.executor.abandon("op/1/do")
        assert await parts.result("op/1/do", 3) == results[0]


async def test_giving_up_what_is_over_or_unknown_is_answered(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        done = await parts.do("op/1/do", CREATE)
        parts.executor.abandon("op/1/do")
        again = await parts.result("op/1/do", 2)
        assert done.error is again.error is None and again.outcome == Outcome()
        parts.executor.abandon("op/9/do")
        unknown = await parts.result("op/9/do")
        assert unknown.error is not None
        assert unknown.error.code == "cancelled"
        # The word to give it up came before it did.
        assert await parts.do("op/9/do", START) == unknown
        assert parts.effects() == ["container.create 101 op/1/do"]


async def test_a_command_that_comes_together_with_the_word_to_give_it_up_does_not_run(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        parts.executor.abandon("op/1/do")
        parts.executor.receive(parts.command("op/1/do", CREATE))
        given_up = await parts.result("op/1/do")
        assert given_up.error is not None and given_up.error.code == "cancelled"
        assert await parts.do("op/1/do", CREATE) == given_up
        assert parts.effects() == []


async def test_a_command_that_failed_tells_what_is_there(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        await parts.do("op/1/do", CREATE)
        parts.driver.script.faults.append(Fault("container.start", when="after"))
        failed = await parts.do("op/2/do", START)
        assert failed.error is not None
        told = [message for message in parts.sent if isinstance(message, StateChanged)]
        assert [(one.container.status, one.removed) for one in told] == [(Status.RUNNING, False)]
        assert parts.sent.index(told[0]) < parts.sent.index(failed)
        parts.driver.script.faults.append(Fault("container.delete", when="after"))
        assert (await parts.do("op/3/do", DeleteContainer("101", 1, force=True))).error is not None
        gone = [message for message in parts.sent if isinstance(message, StateChanged)][-1]
        assert (gone.container.id, gone.container.generation, gone.removed) == ("101", 1, True)


async def test_what_was_begun_before_a_restart_and_given_up_never_runs(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        parts.driver.script.delays["container.create"] = 60
        parts.executor.receive(parts.command("op/1/do", CREATE))
        await parts.until(lambda: Accepted("op/1/do") in parts.sent)
    async with agent_parts(tmp_path) as parts:
        parts.executor.abandon("op/1/do")
        given_up = await parts.result("op/1/do")
        assert given_up.error is not None
        assert given_up.error.code == "cancelled"
        assert await parts.do("op/1/do", CREATE) == given_up
        assert parts.effects() == []


async def test_a_container_of_another_generation_is_not_deleted(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        await parts.do("op/1/do", CREATE)
        refused = await parts.do("op/2/do", DeleteContainer("101", 7, force=True), generation=7)
        assert refused.error is not None
        assert (refused.error.code, refused.error.field) == ("conflict", "generation")
        assert (await parts.driver.inspect("101")).generation == 1
