"""What every driver does: the same tests on the fake driver and on real LXC containers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.drivers.base import Driver, Publication
from common.clock import SystemClock
from common.errors import Conflict, InvalidRequest, NotFound
from common.reports import ContainerReport, ContainerSpec
from common.states import Status
from tests.helpers.busybox import PROGRAM, busybox_archive
from tests.lxc import conftest as machine

own_network = machine.own_network
node_directory = machine.state_directory
CONFIG = {"limits.memory": "64MiB", "limits.processes": "50"}
pytestmark = pytest.mark.timeout(120)


@dataclass
class Subject:
    """A driver under test."""

    driver: Driver
    config: AgentConfig
    heard: list[tuple[ContainerReport, bool]] = field(default_factory=list)
    image: str = ""

    def hear(self, report: ContainerReport, gone: bool) -> None:
        self.heard.append((report, gone))


def make_driver(kind: str, config: AgentConfig) -> Driver:
    if kind == "fake":
        from agent.drivers.fake import FakeDriver

        return FakeDriver(config, SystemClock())
    from agent.drivers.lxc.driver import LxcDriver

    return LxcDriver(config, SystemClock())


@pytest.fixture(params=["fake", pytest.param("lxc", marks=pytest.mark.lxc), pytest.param("dir", marks=pytest.mark.lxc)])
async def subject(request: pytest.FixtureRequest, node_directory: Path) -> AsyncIterator[Subject]:
    """`dir` is LXC on plain directories."""
    kind = request.param
    name = request.getfixturevalue("own_network") if kind != "fake" else "vzt-fake"
    config = AgentConfig(
        state=node_directory,
        node="test",
        driver="fake" if kind == "fake" else "lxc",
        storage="dir" if kind == "dir" else "btrfs",
        pool_size=1024 * 2**20,
        managed_bridge="vztbr0",
        subnet="10.91.8.0/24",
        cgroup=name,
    )
    subject = Subject(make_driver(kind, config), config)
    try:
        await subject.driver.open(subject.hear)
        subject.image = await have_image(subject)
        yield subject
    finally:
        await subject.driver.shut_down()
        await subject.driver.purge()
    for file in config.state.glob("fake"):
        shutil.rmtree(file)
    if kind != "fake":
        assert machine.leftovers(config) == []


async def have_image(subject: Subject) -> str:
    archive = busybox_archive() if PROGRAM.exists() else b"image"
    file = subject.config.state / "image.tar"
    file.write_bytes(archive)
    fingerprint = hashlib.sha256(archive).hexdigest()
    await subject.driver.unpack_image(fingerprint, "rootfs", file, False, lambda stage, percent: None)
    file.unlink()
    return fingerprint


def spec(id: str = "101", generation: int = 1, **changes: str) -> ContainerSpec:
    return ContainerSpec(id, generation, changes.get("hostname", f"host-{id}"), f"00:16:3e:00:01:{len(id):02x}", CONFIG)


async def status(subject: Subject, id: str = "101") -> int:
    return (await subject.driver.inspect(id)).status


async def test_a_life(subject: Subject) -> None:
    driver = subject.driver
    await driver.create(spec(), subject.image)
    report = await driver.inspect("101")
    assert (report.generation, report.status, report.hostname, report.pid) == (1, Status.STOPPED, "host-101", None)
    assert report.config == CONFIG
    await driver.start("101")
    assert await status(subject) == Status.RUNNING
    await driver.freeze("101")
    assert await status(subject) == Status.FROZEN
    await driver.unfreeze("101")
    assert await status(subject) == Status.RUNNING
    await driver.stop("101", 30, force=False)
    assert await status(subject) == Status.STOPPED
    await driver.delete("101", force=False)
    assert await driver.containers() == []
    assert subject.heard == [], "what commands do is no news"


async def test_everything_can_be_done_twice(subject: Subject) -> None:
    driver = subject.driver
    works: list[Callable[[], Awaitable[None]]] = [
        lambda: driver.create(spec(), subject.image),
        lambda: driver.create_snapshot("101", "one"),
        lambda: driver.copy(spec("102x"), "101", None),
        lambda: driver.start("101"),
        lambda: driver.freeze("101"),
        lambda: driver.start("101"),
        lambda: driver.unfreeze("101"),
        lambda: driver.stop("101", 10, force=True),
        lambda: driver.restore_snapshot("101", "one"),
        lambda: driver.rename_snapshot("101", "one", "first"),
        lambda: driver.rename_snapshot("101", "first", "first"),
        lambda: driver.rename_snapshot("101", "first", "one"),
        lambda: driver.rename("101", spec("103yy")),
        lambda: driver.update(spec("103yy", hostname="new")),
        lambda: driver.delete_snapshot("103yy", "one"),
        lambda: driver.delete("103yy", force=False),
        lambda: driver.drop_image(subject.image),
    ]
    for work in works:
        await work()
        await work()
    assert [report.id for report in await driver.containers()] == ["102x"]


async def test_another_generation_is_a_conflict(subject: Subject) -> None:
    await subject.driver.create(spec(), subject.image)
    for work in (
        subject.driver.create(spec(generation=2), subject.image),
        subject.driver.copy(spec(generation=2), "101", None),
    ):
        with pytest.raises(Conflict):
            await work
    assert (await subject.driver.inspect("101")).generation == 1


async def test_one_that_is_there_is_refreshed_from_another(subject: Subject) -> None:
    driver = subject.driver
    await driver.create(spec(), subject.image)
    await driver.create(spec("102x", hostname="kept"), None)
    before = await driver.inspect("102x")
    for _ in range(2):
        await driver.copy(spec("102x", hostname="kept"), "101", None, refresh=True)
    assert await driver.inspect("102x") == before
    await driver.start("102x")
    with pytest.raises(Conflict):
        await driver.copy(spec("102x", hostname="kept"), "101", None, refresh=True)
    with pytest.raises(NotFound):
        await driver.copy(spec("none"), "101", None, refresh=True)
    await driver.delete("102x", force=True)


async def test_what_is_not_there(subject: Subject) -> None:
    driver = subject.driver
    works = (
        driver.inspect("none"),
        driver.start("none"),
        driver.stop("none", 1, False),
        driver.freeze("none"),
        driver.unfreeze("none"),
        driver.update(spec("none")),
        driver.rename("none", spec("other")),
        driver.create_snapshot("none", "one"),
        driver.restore_snapshot("none", "one"),
        driver.rename_snapshot("none", "one", "two"),
        driver.copy(spec(), "none", None),
        driver.create(spec(), "0" * 64),
    )
    for work in works:
        with pytest.raises(NotFound):
            await work
    await driver.delete("none", force=False)
    await driver.delete_snapshot("none", "one")
    await driver.drop_image("0" * 64)
    assert await driver.containers() == []


async def test_a_snapshot_gets_another_name(subject: Subject) -> None:
    driver = subject.driver
    await driver.create(spec(), subject.image)
    for name in ("one", "two"):
        await driver.create_snapshot("101", name)
    taken = {one.name: one.created_at for one in (await driver.inspect("101")).snapshots}
    with pytest.raises(Conflict):
        await driver.rename_snapshot("101", "one", "two")
    with pytest.raises(NotFound):
        await driver.rename_snapshot("101", "none", "other")
    await driver.start("101")
    await driver.rename_snapshot("101", "one", "first")
    named = {one.name: one.created_at for one in (await driver.inspect("101")).snapshots}
    assert named == {"first": taken["one"], "two": taken["two"]}
    await driver.stop("101", 30, force=True)
    with pytest.raises(NotFound):
        await driver.restore_snapshot("101", "one")
    await driver.restore_snapshot("101", "first")


async def test_a_running_container_is_not_touched(subject: Subject) -> None:
    driver = subject.driver
    await driver.create(spec(), subject.image)
    await driver.create_snapshot("101", "one")
    for work in (driver.freeze("101"), driver.unfreeze("101")):
        with pytest.raises(Conflict):
            await work
    await driver.start("101")
    for work in (
        driver.delete("101", force=False),
        driver.rename("101", spec("other")),
        driver.restore_snapshot("101", "one"),
    ):
        with pytest.raises(Conflict):
            await work
    assert await status(subject) == Status.RUNNING
    await driver.delete("101", force=True)
    with pytest.raises(NotFound):
        await driver.inspect("101")


async def test_a_new_agent_finds_everything(subject: Subject) -> None:
    await subject.driver.create(spec(), subject.image)
    await subject.driver.create_snapshot("101", "one")
    await subject.driver.start("101")
    before = await subject.driver.inspect("101")
    await subject.driver.close()
    await subject.driver.open(subject.hear)
    assert await subject.driver.inspect("101") == before
    assert await subject.driver.has_image(subject.image, privileged=False)
    assert not await subject.driver.has_image(subject.image, privileged=True)
    assert [(image.fingerprint, image.mapped) for image in await subject.driver.images()] == [(subject.image, True)]
    await subject.driver.stop("101", 30, force=False)


async def test_one_of_another_generation_is_adopted(subject: Subject) -> None:
    driver, kept = subject.driver, spec(generation=5, hostname="kept")
    await driver.create(spec(), subject.image)
    await driver.create_snapshot("101", "one")
    await driver.start("101")
    before = await driver.inspect("101")
    with pytest.raises(Conflict):
        await driver.adopt(kept, 2)
    with pytest.raises(NotFound):
        await driver.adopt(spec("none"), 0)
    for _ in range(2):
        await driver.adopt(kept, 1)
    adopted = await driver.inspect("101")
    assert (adopted.generation, adopted.hostname, adopted.status) == (5, "kept", Status.RUNNING)
    assert (adopted.snapshots, adopted.hwaddr, adopted.pid) == (before.snapshots, before.hwaddr, before.pid)
    for _ in range(2):
        await driver.settle_adoption("101", keep=False)
    assert await driver.inspect("101") == before
    await driver.adopt(kept, 1)
    await driver.settle_adoption("101", keep=True)
    await driver.settle_adoption("101", keep=False)
    await driver.close()
    await driver.open(subject.hear)
    assert await driver.inspect("101") == adopted
    await driver.settle_adoption("none", keep=False)
    await driver.delete("101", force=True)
    assert await driver.containers() == []


async def test_what_the_node_was_told_is_reported_and_nothing_else(subject: Subject) -> None:
    await subject.driver.create(spec(), subject.image)
    for act in (subject.driver.start, subject.driver.freeze, subject.driver.unfreeze):
        await act("101")
        report = await subject.driver.inspect("101")
        assert (report.config, report.altered, report.bare) == (CONFIG, (), False)
        assert report.hwaddr == spec().hwaddr
    await subject.driver.stop("101", 30, force=True)
    assert (await subject.driver.inspect("101")).altered == ()


async def test_samples(subject: Subject) -> None:
    driver = subject.driver
    await driver.create(spec(), subject.image)
    await driver.create(spec("102x"), subject.image)
    await driver.start("101")
    samples = {sample.id: sample for sample in driver.sample()}
    assert samples.keys() == {"101", "102x"}
    assert samples["101"].memory_usage is not None
    assert samples["101"].memory_limit == 64 * 2**20
    assert samples["102x"].memory_usage is None
    assert [sample.id for sample in driver.sample(["101", "none"])] == ["101"]
    node = driver.sample_node()
    assert node.memory_free > 0
    facts = await driver.facts()
    assert facts.cpus > 0
    assert facts.memory > 0
    assert ("disk_limits" in facts.capabilities) == driver.capabilities.disk_limits


async def test_an_unknown_layout_is_refused(subject: Subject) -> None:
    file = subject.config.state / "image"
    file.write_bytes(b"x")
    with contextlib.closing(file.open("rb")), pytest.raises(InvalidRequest):
        await subject.driver.unpack_image("1" * 64, "zip", file, False, lambda stage, percent: None)
    assert not await subject.driver.has_image("1" * 64, privileged=False)
    file.unlink()


async def test_it_is_published(subject: Subject) -> None:
    driver, made = subject.driver, spec()
    await driver.create(made, subject.image)
    await driver.create_snapshot("101", "one")
    named = [f"rootfs/etc/{name}" for name in ("hostname", "machine-id")]
    for snapshot in (None, "one"):
        files = await published(driver, Publication("101", snapshot, b"architecture: x86_64\n", "none"))
        assert next(iter(files)) == "metadata.yaml" and files["metadata.yaml"] == b"architecture: x86_64\n"
        assert named[0] not in files and not files.get(named[1])
        assert all(name.partition("/")[0] in ("metadata.yaml", "rootfs") for name in files)
        assert not any(name.startswith("rootfs/dev/") for name in files)
    await driver.start("101")
    with pytest.raises(Conflict):
        await published(driver, Publication("101", None, b"", "none"))
    for what in (Publication("101", None, b"a: b\n", "none", force=True), Publication("101", "one", b"a: b\n", "none")):
        assert (await published(driver, what))["metadata.yaml"] == b"a: b\n"
    assert await status(subject) == Status.RUNNING
    for container, snapshot in (("none", None), ("101", "none")):
        with pytest.raises(NotFound):
            await published(driver, Publication(container, snapshot, b"", "none"))
    stopped_early = driver.publish(Publication("101", "one", b"a: b\n", "none"))
    assert await anext(stopped_early)
    await stopped_early.aclose()  # type: ignore[attr-defined]
    await driver.delete("101", force=True)


async def published(driver: Driver, what: Publication) -> dict[str, bytes]:
    """The files of an image that is not compressed, in their order."""
    content = b"".join([piece async for piece in driver.publish(what)])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {member.name: archive.extractfile(member) if member.isreg() else None for member in archive}
        return {name: b"" if file is None else file.read() for name, file in files.items()}
