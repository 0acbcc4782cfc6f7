"""Rounds of transfers between two agents: command, channel and driver together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import transfers
from agent.channel import channels, direct
from agent.channel.base import Channel, Restarted
from agent.drivers.base import Incoming, Outgoing, ReportTransfer
from common.commands import CreateContainer, CreateSnapshot, ReceiveContainer, Route, SendContainer, StartContainer
from common.errors import NoSpace, Unavailable
from common.messages import Progress, Result
from tests.helpers.agent_parts import EPOCH, Parts, agent_parts, spec


@asynccontextmanager
async def two_agents(directory: Path) -> AsyncIterator[tuple[Parts, Parts]]:
    """The source, which has container 101, and the target."""
    for name in ("source", "target"):
        (directory / name).mkdir()
    async with agent_parts(directory / "source") as source, agent_parts(directory / "target") as target:
        assert (await source.do("op/make/do", CreateContainer(spec(), None))).error is None
        yield source, target


def route(here: Parts, there: Parts, **changed: Any) -> Route:
    """The way as `here` sees it; the port is the target's."""
    fields: dict[str, Any] = {"transfer": "op", "round": 0, "peer": "other", "token": "token"}
    address = f"tcp://127.0.0.1:{there.data_port}"
    return Route(**{**fields, "peer_key": there.keys.public, "address": address, **changed})


def send(source: Parts, target: Parts, **changed: Any) -> SendContainer:
    """The command to the source."""
    return SendContainer("101", route(source, target, **changed), "files", last=True, moving=True, with_snapshots=True)


def receive(source: Parts, target: Parts, last: bool = True, **changed: Any) -> ReceiveContainer:
    """The command to the target."""
    return ReceiveContainer(spec(), route(target, source, **changed), "files", last=last)


async def both(source: Parts, target: Parts, name: str = "move", **changed: Any) -> tuple[Result, Result]:
    """One round at both ends."""
    return await asyncio.gather(
        source.do(f"op/{name}/do-send", send(source, target, **changed)),
        target.do(f"op/{name}/do-receive", receive(source, target, **changed)),
    )


def code(result: Result) -> str:
    return result.error.code if result.error is not None else ""


async def test_what_one_node_sends_another_receives(tmp_path: Path) -> None:
    async with two_agents(tmp_path) as (source, target):
        await source.do("op/snapshot/do", CreateSnapshot("101", "s"))
        source.driver.write("101", "x" * 500_000)
        sent, received = await both(source, target)
        assert sent.error is None and received.error is None
        assert sent.outcome is not None and received.outcome is not None
        assert sent.outcome.bytes == received.outcome.bytes
        assert (sent.outcome.bytes or 0) > 500_000
        assert received.outcome.container is not None
        assert [snapshot.name for snapshot in received.outcome.container.snapshots] == ["s"]
        told = [message for message in source.sent if isinstance(message, Progress)]
        assert told[-1].total == told[-1].processed == sent.outcome.bytes
        assert not [message for message in target.sent if isinstance(message, Progress)], "the sender alone tells"


async def test_rounds_follow_each_other_on_the_same_port(tmp_path: Path) -> None:
    async with two_agents(tmp_path) as (source, target):
        for number in range(4):
            results = await both(source, target, f"round{number}", round=number)
            assert [code(result) for result in results] == ["", ""]


async def test_an_end_that_fails_tells_the_other_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(what: Incoming, channel: Channel) -> None:
        await channel.read()
        raise NoSpace("the pool is full")

    async with two_agents(tmp_path) as (source, target):
        monkeypatch.setattr(target.driver, "receive", full)
        sent, received = await both(source, target)
        assert code(received) == "no-space"
        assert sent.error is not None and sent.error.code == "unavailable"
        assert "gave up: the pool is full" in sent.error.text


async def test_a_sender_that_must_not_send_stops_the_receiver(tmp_path: Path) -> None:
    async with two_agents(tmp_path) as (source, target):
        await source.do("op/start/do", StartContainer("101"))
        sent, received = await both(source, target)
        assert code(sent) == "conflict"
        assert received.error is not None and "is running" in received.error.text
        assert await target.driver.containers() == []


async def test_a_failure_of_the_way_is_told_and_not_what_it_led_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def confused(what: Incoming, channel: Channel) -> None:
        try:
            while await channel.read():
                pass
        except Unavailable as error:
            raise NoSpace("something that follows from it") from error

    async def broken(what: Outgoing, channel: Channel, report: ReportTransfer) -> None:
        await channel.write(b"some")
        raise NoSpace("the source's disk")

    async with two_agents(tmp_path) as (source, target):
        monkeypatch.setattr(target.driver, "receive", confused)
        monkeypatch.setattr(source.driver, "send", broken)
        sent, received = await both(source, target)
        assert code(sent) == "no-space"
        assert received.error is not None and received.error.code == "unavailable"
        assert "the source's disk" in received.error.text


async def test_both_ends_are_done_only_when_the_driver_has_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = asyncio.Event()

    async def slow(what: Incoming, channel: Channel) -> None:
        while await channel.read():
            pass
        await committed.wait()

    async def quick(what: Outgoing, channel: Channel, report: ReportTransfer) -> None:
        await channel.write(b"everything")

    async with two_agents(tmp_path) as (source, target):
        monkeypatch.setattr(target.driver, "receive", slow)
        monkeypatch.setattr(source.driver, "send", quick)
        sending = asyncio.ensure_future(source.do("op/move/do-send", send(source, target)))
        receiving = asyncio.ensure_future(target.do("op/move/do-receive", receive(source, target, last=False)))
        await asyncio.sleep(0.5)
        assert not sending.done() and not receiving.done()
        committed.set()
        assert code(await sending) == code(await receiving) == ""


async def test_a_driver_that_leaves_data_unread_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wordy(what: Outgoing, channel: Channel, report: ReportTransfer) -> None:
        for _ in range(100):
            await channel.write(bytes(100_000))

    async def quick(what: Incoming, channel: Channel) -> None:
        await channel.read()

    async with two_agents(tmp_path) as (source, target):
        monkeypatch.setattr(source.driver, "send", wordy)
        monkeypatch.setattr(target.driver, "receive", quick)
        results = await asyncio.gather(
            source.do("op/move/do-send", send(source, target)),
            target.do("op/move/do-receive", receive(source, target, last=False)),
        )
        assert [code(result) for result in results] == ["", ""]


async def test_a_node_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "REACH_WITHIN", 0.3)
    async with two_agents(tmp_path) as (source, target):
        result = await source.do("op/move/do-send", send(source, target))
        assert code(result) == "unreachable"


async def test_a_restarted_agent_begins_the_round_anew(tmp_path: Path) -> None:
    """The target's agent is stopped in the middle and comes back with the same command; the source does not notice."""
    async with two_agents(tmp_path) as (source, target):
        source.driver.write("101", "x" * 3_000_000)
        slow = {"rate": 2_000_000}
        sending = asyncio.ensure_future(source.do("op/move/do-send", send(source, target, **slow)))
        first = receive(source, target)
        target.executor.receive(target.command("op/move/do-receive", first))
        await asyncio.sleep(0.6)
        found = await asyncio.gather(_restart(target))
        assert found == [None]
        received = await target.do("op/move/do-receive", first)
        assert code(received) == code(await sending) == ""
        assert [container.id for container in await target.driver.containers()] == ["101"]
        assert [effect for effect in target.effects() if "receive" in effect] == [
            "container.receive 101 op/move/do-receive"
        ]


async def test_a_restart_of_the_controller_does_not_touch_it(tmp_path: Path) -> None:
    """It sends its commands again in its next session; what is under way goes on, once."""
    async with two_agents(tmp_path) as (source, target):
        source.driver.write("101", "x" * 1_500_000)
        commands = [
            (source, source.command("op/move/do-send", send(source, target, rate=2_000_000))),
            (target, target.command("op/move/do-receive", receive(source, target))),
        ]
        for node, command in commands:
            node.executor.receive(command)
        await asyncio.sleep(0.4)
        for node, command in commands:
            node.executor.end_session()
            await node.executor.begin_session("session-2", EPOCH + 1)
            node.executor.receive(msgspec.structs.replace(command, session="session-2", epoch=EPOCH + 1))
        results = [await node.result(command.id) for node, command in commands]
        assert [code(result) for result in results] == ["", ""]
        assert sum("receive" in effect for effect in target.effects()) == 1
        assert sum(isinstance(message, Result) for message in target.sent) == 1


async def _restart(parts: Parts) -> None:
    """As far as transfers go: what is under way is dropped, and nothing is said to the other end."""
    node_channels: channels.Channels = parts.executor._node.transfers._channels
    node_channels.leave()
    await parts.executor.close()
    await node_channels.close()
    node_channels._leaving = False


async def test_begun_anew_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0

    async def restarted(what: Outgoing, channel: Channel, report: ReportTransfer) -> None:
        nonlocal rounds
        rounds += 1
        raise Restarted("the other end has begun anew")

    async with two_agents(tmp_path) as (source, target):
        monkeypatch.setattr(transfers, "MOST_RESTARTS", 3)
        monkeypatch.setattr(source.driver, "send", restarted)
        receiving = asyncio.ensure_future(target.do("op/move/do-receive", receive(source, target)))
        result = await source.do("op/move/do-send", send(source, target))
        assert result.error is not None and "begun anew 3 times" in result.error.text
        assert rounds == 4
        target.executor.abandon("op/move/do-receive")
        assert code(await receiving) in ("cancelled", "unavailable")


async def test_a_command_that_is_given_up_ends_the_other_end(tmp_path: Path) -> None:
    async with two_agents(tmp_path) as (source, target):
        source.driver.write("101", "x" * 5_000_000)
        slow = {"rate": 500_000}
        sending = asyncio.ensure_future(source.do("op/move/do-send", send(source, target, **slow)))
        receiving = asyncio.ensure_future(target.do("op/move/do-receive", receive(source, target)))
        await asyncio.sleep(0.5)
        source.executor.abandon("op/move/do-send")
        assert code(await sending) == "cancelled"
        received = await receiving
        assert received.error is not None and "gave up: the command was given up" in received.error.text
        assert await target.driver.containers() == []
