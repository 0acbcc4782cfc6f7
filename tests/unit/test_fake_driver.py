"""The fake driver: the contract of drivers, and what makes it fit for tests: persistence, effects, delays, faults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentConfig
from agent.drivers import create_driver
from agent.drivers.base import Incoming, Outgoing
from agent.drivers.fake import FakeDriver
from agent.drivers.fake_node import FakeNode
from agent.drivers.fake_state import Fault
from common.clock import ManualClock, SystemClock
from common.errors import Conflict, DeadlinePassed, DriverFailed, InvalidRequest, NotFound
from common.reports import ContainerReport, ContainerSpec
from common.states import Status
from tests.helpers.agent_parts import spec
from tests.helpers.channels import carried, channel_pair

FINGERPRINT = "ab" * 32


def make(state: Path, boot_id: str = "boot-1", clock: ManualClock | None = None) -> FakeDriver:
    config = AgentConfig(state=state, node="node1", driver="fake")
    return FakeDriver(config, clock or ManualClock(), boot_id=lambda: boot_id)


def ignore(_report: ContainerReport, _gone: bool) -> None:
    """Listen to nothing."""


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[FakeDriver]:
    driver = make(tmp_path)
    await driver.open(ignore)
    yield driver
    await driver.close()


def effects(driver: FakeDriver) -> list[str]:
    return [line.split()[0] for line in driver.effects_file.read_text().splitlines()]


def test_the_factory_makes_it(tmp_path: Path) -> None:
    config = AgentConfig(state=tmp_path, node="node1", driver="fake")
    assert isinstance(create_driver(config, SystemClock()), FakeDriver)


async def test_every_change_done_twice_has_one_effect(driver: FakeDriver) -> None:
    changes: list[Callable[[], Awaitable[None]]] = [
        lambda: driver.create(spec(), None),
        lambda: driver.start("101"),
        lambda: driver.freeze("101"),
        lambda: driver.unfreeze("101"),
        lambda: driver.create_snapshot("101", "s"),
        lambda: driver.update(spec(limits_memory="64MiB")),
        lambda: driver.stop("101", 1, force=False),
        lambda: driver.restore_snapshot("101", "s"),
        lambda: driver.copy(spec("102"), "101", "s"),
        lambda: driver.delete_snapshot("101", "s"),
        lambda: driver.rename("101", spec("103")),
        lambda: driver.delete("103", force=False),
    ]
    for number, change in enumerate(changes):
        for _ in range(2):
            await change()
        if await driver.containers():
            driver.write((await driver.containers())[0].id, f"changed inside after {number}")
    assert effects(driver) == [
        "container.create",
        "container.start",
        "container.freeze",
        "container.unfreeze",
        "snapshot.create",
        "container.update",
        "container.stop",
        "snapshot.restore",
        "container.copy",
        "snapshot.delete",
        "container.rename",
        "container.delete",
    ]


async def test_wrong_states_are_conflicts(driver: FakeDriver) -> None:
    await driver.create(spec(), None)
    for change in (driver.freeze("101"), driver.unfreeze("101"), driver.create(spec(generation=2), None)):
        with pytest.raises(Conflict):
            await change
    await driver.create_snapshot("101", "s")
    await driver.create(spec("102"), None)
    await driver.start("101")
    running = [
        driver.delete("101", force=False),
        driver.rename("101", spec("103")),
        driver.restore_snapshot("101", "s"),
    ]
    for change in running:
        with pytest.raises(Conflict):
            await change
    with pytest.raises(Conflict):
        await driver.rename("102", spec("101"))
    await driver.delete("101", force=True)


async def test_what_is_not_there_is_not_found(driver: FakeDriver) -> None:
    missing = [
        driver.inspect("x"),
        driver.start("x"),
        driver.stop("x", 1, force=True),
        driver.update(spec("x")),
        driver.copy(spec("y"), "x", None),
        driver.create(spec("z"), FINGERPRINT),
        driver.create_snapshot("x", "s"),
    ]
    for call in missing:
        with pytest.raises(NotFound):
            await call
    await driver.create(spec(), None)
    with pytest.raises(NotFound):
        await driver.restore_snapshot("101", "none")
    assert driver.sample(["x"]) == []


async def test_images(driver: FakeDriver, tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"x" * 100)
    for _ in range(2):
        await driver.unpack_image(FINGERPRINT, "rootfs", file, False, lambda _stage, _percent: None)
    assert await driver.has_image(FINGERPRINT, False)
    assert not await driver.has_image(FINGERPRINT, True)
    assert [(image.fingerprint, image.size) for image in await driver.images()] == [(FINGERPRINT, 100)]
    await driver.create(spec(), FINGERPRINT)
    for _ in range(2):
        await driver.drop_image(FINGERPRINT)
    assert effects(driver) == ["image.ensure", "container.create", "image.drop"]


def outgoing(container: str = "101", round: int = 0, *, last: bool = True, **changes: Any) -> Outgoing:
    return Outgoing(container, "t1", round, "files", last, **{"moving": True, "with_snapshots": True, **changes})


async def travel(source: FakeDriver, sent: Outgoing, target: FakeDriver, received: ContainerSpec, **more: Any) -> None:
    one, other = channel_pair()
    incoming = Incoming(received, sent.transfer, sent.round, sent.format, sent.last, **more)
    await carried(source.send(sent, one, lambda *_: None), target.receive(incoming, other), one)


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[FakeDriver]:
    (tmp_path / "other").mkdir()
    made = make(tmp_path / "other")
    await made.open(ignore)
    yield made
    await made.close()


async def test_a_container_moves_with_its_snapshots_and_content(driver: FakeDriver, other: FakeDriver) -> None:
    await driver.create(spec(), None)
    driver.write("101", "first")
    await driver.create_snapshot("101", "s")
    driver.write("101", "second")
    await driver.start("101")
    await travel(driver, outgoing(last=False), other, spec("201", generation=2))
    assert await other.containers() == []
    with pytest.raises(Conflict):
        await travel(driver, outgoing(round=1), other, spec("201", generation=2))
    await driver.stop("101", 1, force=True)
    for _ in range(2):
        await travel(driver, outgoing(round=1), other, spec("201", generation=2))
    report = await other.inspect("201")
    assert (report.generation, [snapshot.name for snapshot in report.snapshots]) == (2, ["s"])
    await other.restore_snapshot("201", "s")
    for node in (driver, other):
        for _ in range(2):
            await node.end_transfer("t1")
    assert effects(other) == ["container.receive", "snapshot.restore", "transfer.end"]
    assert effects(driver)[-1] == "transfer.end"


async def test_what_is_sent_wrongly_makes_no_container(driver: FakeDriver, other: FakeDriver) -> None:
    one, end = channel_pair()
    receiving = asyncio.ensure_future(other.receive(Incoming(spec("202"), "t1", 0, "files", True), end))
    await one.write(b"nonsense")
    await asyncio.gather(one.end(), receiving, return_exceptions=True)
    assert isinstance(receiving.exception(), InvalidRequest)
    with pytest.raises(NotFound):
        await travel(driver, outgoing("none"), other, spec("202"))
    assert await other.containers() == []


async def test_one_that_is_there_is_refreshed(driver: FakeDriver, other: FakeDriver) -> None:
    for node, content in ((driver, "new"), (other, "old")):
        await node.create(spec(), None)
        node.write("101", content)
    await driver.create_snapshot("101", "s")
    await other.start("101")
    with pytest.raises(Conflict):
        await travel(driver, outgoing(moving=False), other, spec(), refresh=True)
    await other.stop("101", 1, force=True)
    for _ in range(2):
        await travel(driver, outgoing(moving=False), other, spec(), refresh=True)
    assert [snapshot.name for snapshot in (await other.inspect("101")).snapshots] == ["s"]
    assert effects(other).count("container.receive") == 1
    with pytest.raises(NotFound):
        await travel(driver, outgoing(moving=False), other, spec("none"), refresh=True)


async def test_a_restarted_agent_finds_its_containers_running(driver: FakeDriver, tmp_path: Path) -> None:
    await driver.create(spec(boot_autostart="true"), None)
    await driver.start("101")
    await driver.close()
    again = make(tmp_path)
    await again.open(ignore)
    report = await again.inspect("101")
    assert (report.status, report.config) == (Status.RUNNING, {"boot.autostart": "true"})
    await again.close()


async def test_after_a_boot_nothing_runs(driver: FakeDriver, tmp_path: Path) -> None:
    await driver.create(spec(), None)
    await driver.start("101")
    await driver.close()
    again = make(tmp_path, boot_id="boot-2")
    await again.open(ignore)
    assert (await again.inspect("101")).status == Status.STOPPED
    await again.close()


async def test_shut_down_stops_and_purge_leaves_nothing(driver: FakeDriver, tmp_path: Path) -> None:
    await driver.create(spec(), None)
    await driver.start("101")
    await driver.close()
    again = make(tmp_path)
    await again.shut_down()
    assert (await again.inspect("101")).status == Status.STOPPED
    await again.purge()
    assert list(tmp_path.iterdir()) == []
    await make(tmp_path).shut_down()
    assert list(tmp_path.iterdir()) == []


async def test_faults_come_as_often_as_the_script_says(driver: FakeDriver) -> None:
    driver.script.faults = [Fault("container.create", container="101", times=2, text="no luck")]
    for _ in range(2):
        with pytest.raises(DriverFailed, match="no luck"):
            await driver.create(spec(), None)
    await driver.create(spec(), None)
    await driver.create(spec("102"), None)
    driver.script.faults = [Fault("container.start", when="after")]
    with pytest.raises(DriverFailed):
        await driver.start("101")
    assert (await driver.inspect("101")).status == Status.RUNNING, "the effect has happened"


async def test_the_script_is_read_again_when_it_changes(driver: FakeDriver, tmp_path: Path) -> None:
    file = tmp_path / "fake" / "script.json"
    file.write_text(json.dumps({"faults": [{"command": "container.create", "code": "no-space"}], "cpus": 3}))
    with pytest.raises(Exception, match="scripted"):
        await driver.create(spec(), None)
    assert (await driver.facts()).cpus == 3
    file.write_text('{"unknown": 1}')
    with pytest.raises(InvalidRequest):
        await driver.create(spec(), None)


async def test_delays_and_cancellation_leave_nothing_half_done(driver: FakeDriver) -> None:
    driver.script.delays["container.create"] = 60
    task = asyncio.create_task(driver.create(spec(), None))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await driver.containers() == []
    assert not driver.effects_file.exists()


async def test_a_stubborn_container_does_not_stop_by_asking(driver: FakeDriver) -> None:
    driver.script.stubborn = ["101"]
    await driver.create(spec(), None)
    await driver.start("101")
    with pytest.raises(DeadlinePassed):
        await driver.stop("101", 0.05, force=False)
    assert (await driver.inspect("101")).status == Status.RUNNING
    await driver.stop("101", 0.05, force=True)
    assert (await driver.inspect("101")).status == Status.STOPPED


async def test_changes_by_themselves_are_told_and_commands_are_not(tmp_path: Path) -> None:
    told: asyncio.Queue[tuple[ContainerReport, bool]] = asyncio.Queue()
    driver = make(tmp_path)
    await driver.open(lambda report, gone: told.put_nowait((report, gone)))
    driver.script.lifetimes["101"] = 0.05
    await driver.create(spec(), None)
    await driver.start("101")
    assert told.empty()
    report, gone = await asyncio.wait_for(told.get(), 5)
    assert (report.id, report.status, gone) == ("101", Status.STOPPED, False)
    driver.vanish("101")
    report, gone = told.get_nowait()
    assert (report.id, gone) == ("101", True)
    await driver.close()


async def test_samples_keep_within_limits_and_stopped_ones_have_disk_figures_only(tmp_path: Path) -> None:
    clock = ManualClock()
    driver = make(tmp_path, clock=clock)
    await driver.open(ignore)
    await driver.create(spec(limits_memory="1MiB", limits_disk="1MiB"), None)
    await driver.create(spec("102"), None)
    await driver.start("101")
    clock.advance(10)
    running, stopped = driver.sample()
    assert (running.memory_usage, running.memory_limit, running.disk_usage) == (2**20, 2**20, 2**20)
    assert running.cpu_time
    assert running.interfaces[0].addresses[0].address == "10.0.0.1"
    assert (stopped.memory_usage, stopped.cpu_load, stopped.interfaces) == (None, None, ())
    assert stopped.disk_usage
    assert driver.sample(["101"]) == [running]
    assert driver.sample_node().cpu_load is not None
    await driver.close()


async def test_an_effect_whose_count_a_kill_cut_off_is_counted_at_the_next_start(tmp_path: Path) -> None:
    directory = tmp_path / "fake"
    node = FakeNode(directory, persist=True)
    node.open("boot")
    node.add("container.create", spec("a"), "empty", [])
    node.add("container.create", spec("b"), "empty", [])
    lines = node.effects_file.read_text().splitlines(keepends=True)
    node.effects_file.write_text(lines[0])
    (directory / ".world.json.new").write_text("half a wor")
    for _ in range(2):
        FakeNode(directory, persist=True).open("boot")
        assert node.effects_file.read_text().splitlines(keepends=True) == lines
    assert not (directory / ".world.json.new").exists()
