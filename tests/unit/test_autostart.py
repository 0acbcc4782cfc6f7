"""Which containers start with their host, when, and in which order."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.autostart import Autostart, BootRecord, Candidate, candidates, due
from common.commands import CreateContainer
from common.messages import StateChanged
from common.reports import ContainerReport
from common.states import Status
from tests.helpers.agent_parts import Parts, agent_parts, spec

A, B = Candidate("a", 1, 10), Candidate("b", 2, 0)


def report(id: str, status: Status = Status.STOPPED, generation: int = 1, **config: str) -> ContainerReport:
    return ContainerReport(id, generation, status, {key.replace("_", "."): value for key, value in config.items()})


def test_candidates_are_the_stopped_ones_that_want_to_in_their_order() -> None:
    there = [
        report("low", boot_autostart="true"),
        report("high", boot_autostart="1", boot_autostart_priority="7"),
        report("also-low", boot_autostart="yes"),
        report("not-wanted", boot_autostart="false"),
        report("silent"),
        report("running", Status.RUNNING, boot_autostart="true"),
        report("broken", Status.ERROR, boot_autostart="true"),
        report("unmanaged", generation=0, boot_autostart="true"),
        report("unreadable", boot_autostart="perhaps"),
    ]
    assert [candidate.id for candidate in candidates(there)] == ["high", "also-low", "low"]


@pytest.mark.parametrize(
    ("confirmed", "waited", "delay", "expected"),
    [
        (None, 0, 120, []),
        (None, 119.9, 120, []),
        (None, 120, 120, [A, B]),
        (None, 1e9, None, []),
        ({}, 1e9, 120, []),
        ({"a": 1}, 0, None, [A]),
        ({"a": 2, "b": 2}, 1e9, 120, [B]),
        ({"a": 1, "b": 2, "c": 1}, 0, 120, [A, B]),
    ],
)
def test_what_is_due(
    confirmed: dict[str, int] | None, waited: float, delay: float | None, expected: list[Candidate]
) -> None:
    assert due([A, B], confirmed, waited, delay) == expected


def autostart(parts: Parts, boot_id: str, delay: float | None) -> Autostart:
    record = BootRecord(parts.config.state / "last-boot")
    return Autostart(parts.driver, parts.executor, record, boot_id, parts.sent.append, delay)


async def prepare(tmp_path: Path) -> None:
    """A node on which three containers ran before its host went down."""
    async with agent_parts(tmp_path) as parts:
        for id, priority in (("101", "0"), ("102", "5"), ("103", "9")):
            described = spec(id, boot_autostart="true", boot_autostart_priority=priority)
            await parts.do(f"op/{id}/do", CreateContainer(described, None))
        BootRecord(tmp_path / "last-boot").done("boot-1")


def starts(parts: Parts) -> list[str]:
    return [line.split()[1] for line in parts.effects() if line.startswith("container.start")]


async def test_after_a_boot_the_confirmed_ones_start_by_priority(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with agent_parts(tmp_path, boot_id="boot-2") as parts:
        parts.driver.script.delays["container.start"] = 0.02
        starter = autostart(parts, "boot-2", None)
        running = asyncio.create_task(starter.run())
        await asyncio.sleep(0.05)
        assert starts(parts) == [], "not before the controller's word"
        starter.confirm({"101": 1, "102": 9, "103": 1})
        await running
        assert starts(parts) == ["103", "101"], "102 has another generation"
        told = [m.container for m in parts.sent if isinstance(m, StateChanged)]
        assert [(container.id, container.status) for container in told] == [
            ("103", Status.RUNNING),
            ("101", Status.RUNNING),
        ]
        await autostart(parts, "boot-2", 0).run()
        assert len(starts(parts)) == 2, "once in a boot"


async def test_without_a_controller_all_start_after_the_delay(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with agent_parts(tmp_path, boot_id="boot-2") as parts:
        await asyncio.wait_for(autostart(parts, "boot-2", 0.05).run(), 5)
        assert starts(parts) == ["103", "102", "101"]


async def test_nothing_starts_when_only_the_agent_was_restarted(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with agent_parts(tmp_path) as parts:
        await asyncio.wait_for(autostart(parts, "boot-1", 0).run(), 5)
        assert starts(parts) == []


async def test_an_agent_that_ends_before_the_word_came_waits_again(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with agent_parts(tmp_path, boot_id="boot-2") as parts:
        running = asyncio.create_task(autostart(parts, "boot-2", None).run())
        await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    async with agent_parts(tmp_path, boot_id="boot-2") as parts:
        starter = autostart(parts, "boot-2", None)
        starter.confirm({"101": 1})
        await asyncio.wait_for(starter.run(), 5)
        assert starts(parts) == ["101"]


async def test_one_that_cannot_start_does_not_keep_the_others(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with agent_parts(tmp_path, boot_id="boot-2") as parts:
        parts.driver.script.delays["container.start"] = 0.01
        starter = autostart(parts, "boot-2", None)
        starter.confirm({"101": 1, "102": 1, "103": 1})
        parts.driver.vanish("103")
        await asyncio.wait_for(starter.run(), 5)
        assert starts(parts) == ["102", "101"]


async def test_a_shut_down_counts_as_a_boot(tmp_path: Path) -> None:
    record = BootRecord(tmp_path / "last-boot")
    assert record.is_new("boot-1")
    record.done("boot-1")
    assert not record.is_new("boot-1")
    record.forget()
    assert record.is_new("boot-1")
