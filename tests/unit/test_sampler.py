"""The sampler: when it ticks, what it offers, what a fault does to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.drivers.fake import FakeDriver
from agent.sampler import PER_MESSAGE, YOUNG_INTERVAL, Sampler, batches, has_address
from common import codec
from common.clock import ManualClock
from common.messages import Samples
from common.reports import Address, ContainerSample, Interface, NodeSample
from tests.helpers.agent_parts import spec

NODE = NodeSample(1, 1, 0.5, (0.1, 0.2, 0.3), 9.0)


@asynccontextmanager
async def running(
    tmp_path: Path, interval: float
) -> AsyncIterator[tuple[Sampler, FakeDriver, asyncio.Queue[Sequence[Samples]], asyncio.Event]]:
    clock = ManualClock()
    driver = FakeDriver(AgentConfig(state=tmp_path, node="n", driver="fake"), clock)
    await driver.open(lambda _report, _gone: None)
    ticks: asyncio.Queue[Sequence[Samples]] = asyncio.Queue()
    connected = asyncio.Event()
    sampler = Sampler(driver, clock, ticks.put_nowait, connected, interval)
    task = asyncio.create_task(sampler.run())
    try:
        yield sampler, driver, ticks, connected
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        sampler.close()
        await driver.close()


async def test_it_ticks_at_once_when_connected_and_as_often_as_the_controller_says(tmp_path: Path) -> None:
    async with running(tmp_path, 3600) as (sampler, driver, ticks, connected):
        await driver.create(spec(), None)
        await asyncio.sleep(0.05)
        assert ticks.empty(), "nobody would read them"
        connected.set()
        (samples,) = await asyncio.wait_for(ticks.get(), 5)
        assert [sample.id for sample in samples.containers] == ["101"]
        sampler.set_interval(0.1)
        for _ in range(3):
            await asyncio.wait_for(ticks.get(), 5)


async def test_a_fault_in_one_tick_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, 0.1) as (_sampler, driver, ticks, connected):
        failed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def fail(_names: list[str] | None = None) -> list[ContainerSample]:
            loop.call_soon_threadsafe(failed.set)
            raise OSError("a cgroup file is gone")

        with monkeypatch.context() as patch:
            patch.setattr(driver, "sample", fail)
            connected.set()
            await asyncio.wait_for(failed.wait(), 5)
        await asyncio.wait_for(ticks.get(), 5)
        assert any("samples" in record.message for record in caplog.records)


async def test_one_container_can_be_sampled_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, 3600) as (sampler, driver, _ticks, _connected):
        await driver.create(spec(), None)
        sampled_at, sample = await sampler.take("101")
        assert sample is not None
        assert sample.id == "101"
        assert sampled_at == ManualClock().now().timestamp()
        assert (await sampler.take("missing"))[1] is None


@pytest.mark.parametrize(("count", "messages"), [(0, 1), (1, 1), (PER_MESSAGE, 1), (PER_MESSAGE + 1, 2), (1000, 5)])
def test_a_tick_of_many_containers_is_several_messages_that_fit(count: int, messages: int) -> None:
    largest = 2**63 - 1
    address = Address("inet6", "fe80:0000:0000:0000:0216:3eff:fe00:0001", "64", "link")
    interface = Interface("eth0", "00:16:3e:00:00:01", 1500, True, "veth123", (address,) * 3, *[largest] * 8)
    samples = [
        ContainerSample(f"{number:064}", *[largest] * 8, 0.123456789, largest, largest, 1e9, (interface,) * 4)
        for number in range(count)
    ]
    made = batches(1.0, NODE, samples)
    assert len(made) == messages
    assert [sample for message in made for sample in message.containers] == samples
    assert all(len(codec.encode(message)) < codec.MAX_MESSAGE for message in made)


async def test_a_container_just_started_is_sampled_until_it_has_an_address(tmp_path: Path) -> None:
    async with running(tmp_path, 3600) as (sampler, driver, ticks, connected):
        await driver.create(spec(), None)
        connected.set()
        await asyncio.wait_for(ticks.get(), 5)
        following = asyncio.create_task(sampler.follow_young())
        try:
            await driver.start("101")
            sampler.follow("101")
            (samples,) = await asyncio.wait_for(ticks.get(), 5)
            assert has_address(samples.containers[0]) and samples.node is not None
            await asyncio.sleep(3 * YOUNG_INTERVAL)
            assert ticks.empty(), "it has its address: the ordinary tick is enough"
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
