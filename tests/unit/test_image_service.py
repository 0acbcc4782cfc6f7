"""The image service: which image a request means, one build for all who wait, nothing kept twice, tickets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.clock import ManualClock
from common.errors import Conflict, DriverFailed, Forbidden, InvalidRequest, NoSpace, NotFound, Unavailable
from common.states import Status
from controller.fleet import Fleet
from controller.images.builder import Builder, BuiltImage, ReportProgress
from controller.images.files import ImageFiles, StagedImage
from controller.images.inspect import ImageFacts
from controller.records import Image, Operation, Requestor
from controller.services import images as images_module
from controller.services.images import Images
from controller.services.requests import ImageSource
from controller.store import images as rows
from controller.store import operations as operation_rows
from controller.store.db import Database
from tests.helpers.core import make_template

LATE = Operation(
    id="op",
    kind="image.import",
    status=Status.RUNNING,
    created_at="2026-01-01T00:00:00.000000Z",
    updated_at="2026-01-01T00:00:00.000000Z",
    deadline_at="2026-01-01T01:00:00.000000Z",
    containers=(),
    node=None,
    requestor=Requestor("admin", "tls", "127.0.0.1"),
    request="r",
    parameters={},
    resources={},
)


class SlowBuilder(Builder):
    """Builds when the test lets it."""

    os = "test"

    def __init__(self) -> None:
        self.builds = 0
        self.go_on = asyncio.Event()
        self.failure: Exception | None = None

    def check(self, properties: Mapping[str, str]) -> None:
        if properties.get("release", "1") != "1":
            raise NotFound("no such release", field="source.properties.release")

    def key(self, properties: Mapping[str, str]) -> str:
        return "test:1"

    async def build(self, properties: Mapping[str, str], files: ImageFiles, report: ReportProgress) -> BuiltImage:
        self.builds += 1
        report("begun", None)
        await self.go_on.wait()
        report("building", 50)
        if self.failure is not None:
            raise self.failure
        return BuiltImage(await finished(files.stage(100), b"built"), "rootfs", {"os": "test", "architecture": "amd64"})


async def finished(staged: StagedImage, content: bytes) -> StagedImage:
    await staged.write(content)
    await staged.finish()
    return staged


class Service:
    """An image service on an empty store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "images"
        self.fleet = Fleet(ManualClock())
        self.store = Database(f"sqlite:///{directory / 'template.db'}", self.fleet.apply)
        self.files = ImageFiles(self.directory)
        self.builder = SlowBuilder()
        self.images = Images(self.store, self.fleet, self.files, (self.builder,), ManualClock(), b"key")

    async def upload(self, content: bytes, *aliases: str) -> Image:
        held = await self.images.hold(await finished(self.images.stage(100), content))
        return await self.images.import_upload(held, "x.tar", aliases)

    def left(self) -> list[str]:
        """The files that are neither an image with a row nor directories."""
        return [
            path.name for path in self.directory.rglob("*") if path.is_file() and path.name not in self.fleet.images
        ]


@pytest.fixture
async def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    async def facts(_path: Path) -> ImageFacts:
        return ImageFacts("rootfs", "gz", "x86_64", None, {"os": "Debian", "release": "12"})

    monkeypatch.setattr(images_module, "inspect", facts)
    await asyncio.to_thread(make_template, tmp_path)
    service = Service(tmp_path)
    await service.store.open()
    yield service
    await service.store.close()
    assert service.left() == []


def nothing(_stage: str, _percent: int | None) -> None:
    """A caller without interest in progress."""


# ---------------------------------------------------------------- which image


async def test_an_image_is_named_in_one_way(service: Service) -> None:
    image = await service.upload(b"one", "web")
    other = await service.upload(b"two")
    for source in (
        ImageSource(alias="web"),
        ImageSource(fingerprint=image.fingerprint),
        ImageSource(fingerprint=image.fingerprint[:12].upper()),
    ):
        found = service.images.resolve(source)
        assert (found.fingerprint, found.source, found.architecture) == (image.fingerprint, None, "x86_64")
        assert found.requested["fingerprint"] == image.fingerprint
    for source in (ImageSource(), ImageSource(alias="web", fingerprint="a"), ImageSource(properties={})):
        with pytest.raises(InvalidRequest):
            service.images.resolve(source)
    for source in (ImageSource(alias="none"), ImageSource(fingerprint="0" * 64), ImageSource(fingerprint="")):
        with pytest.raises(NotFound):
            service.images.resolve(source)
    twin = replace(other, fingerprint=image.fingerprint[:20] + "0" * 44)
    service.fleet.images[twin.fingerprint] = twin
    with pytest.raises(InvalidRequest, match="2 images"):
        service.images.resolve(ImageSource(fingerprint=image.fingerprint[:20]))
    del service.fleet.images[twin.fingerprint]


async def test_properties_mean_an_import_else_what_was_built_else_a_build(service: Service) -> None:
    wanted = ImageSource(properties={"os": "test", "architecture": "amd64"})
    first = service.images.resolve(wanted)
    assert (first.fingerprint, first.source, first.architecture) == (None, "test:1", "x86_64")
    service.builder.go_on.set()
    built = await service.images.obtain("test:1", first.properties, nothing)
    assert service.images.resolve(wanted).fingerprint == built.fingerprint
    imported = await service.upload(b"one")
    debian = {"os": "debian", "architecture": "amd64"}
    assert service.images.resolve(ImageSource(properties=debian)).fingerprint == imported.fingerprint
    with pytest.raises(NotFound):
        service.images.resolve(ImageSource(properties={"os": "plan9"}))
    with pytest.raises(NotFound):
        service.images.resolve(ImageSource(properties={"os": "test", "release": "2"}))


# ---------------------------------------------------------------- building


async def test_all_who_want_an_image_wait_for_one_build_and_hear_of_it(service: Service) -> None:
    heard: list[list[Any]] = [[], [], []]
    reports = [lambda stage, percent, to=to: to.append(stage) for to in heard]
    waiting = [asyncio.ensure_future(service.images.obtain("test:1", {"os": "test"}, report)) for report in reports]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    service.builder.go_on.set()
    images = await asyncio.gather(*waiting[1:])
    assert service.builder.builds == 1 and images[0] == images[1] and images[0].source == "test:1"
    assert "building" not in heard[0] and "building" in heard[1] and "building" in heard[2]
    assert await service.images.obtain("test:1", {"os": "test"}, nothing) == images[0]
    assert service.builder.builds == 1


async def test_a_failed_build_fails_all_who_wait_and_the_next_one_tries_again(service: Service) -> None:
    service.builder.failure = DriverFailed("mmdebstrap broke")
    service.builder.go_on.set()
    waiting = [service.images.obtain("test:1", {"os": "test"}, nothing) for _ in range(2)]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [DriverFailed, DriverFailed]
    service.builder.failure = None
    assert (await service.images.obtain("test:1", {"os": "test"}, nothing)).source == "test:1"
    assert service.builder.builds == 2


# ---------------------------------------------------------------- taking in


async def test_the_same_content_is_kept_once_with_all_its_names(service: Service) -> None:
    images = await asyncio.gather(*(service.upload(b"same", f"alias{number}") for number in range(4)))
    assert len({image.fingerprint for image in images}) == 1
    stored = await service.store.read(rows.rows.all)
    assert [sorted(image.aliases) for image in stored] == [[f"alias{number}" for number in range(4)]]
    assert service.files.fingerprints() == [images[0].fingerprint]


async def test_what_was_only_cached_stays_when_it_is_uploaded(service: Service) -> None:
    image = replace(await service.upload(b"one"), cached=True, expires_at="2026-01-01T00:00:00.000000Z", public=True)
    await service.store.write(lambda transaction: rows.rows.replace(transaction, image))
    assert await service.upload(b"one") == replace(image, cached=False, expires_at=None)


async def test_who_sees_public_images_only_finds_no_others(service: Service) -> None:
    one, other = await service.upload(b"one"), await service.upload(b"other")
    public = replace(other, public=True)
    await service.store.write(lambda transaction: rows.rows.replace(transaction, public))
    assert service.images.by_fingerprint(other.fingerprint[:12], public=True) == public
    for prefix in (one.fingerprint, one.fingerprint[:12], ""):
        with pytest.raises(NotFound):
            service.images.by_fingerprint(prefix, public=True)


async def test_an_alias_belongs_to_one_image_even_when_two_come_at_once(service: Service) -> None:
    results = await asyncio.gather(*(service.upload(name, "web") for name in (b"a", b"b")), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "Image"]
    with pytest.raises(Conflict):
        await service.upload(b"c", "web")
    assert len(service.fleet.images) == 1


async def test_what_cannot_be_recorded_leaves_no_file(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(_work: Any) -> Any:
        raise NoSpace("full")

    monkeypatch.setattr(service.store, "write", full)
    with pytest.raises(NoSpace):
        await service.upload(b"one")


async def test_an_upload_is_taken_once_and_can_be_thrown_away(service: Service) -> None:
    held = await service.images.hold(await finished(service.images.stage(100), b"one"))
    service.images.let_go(held)
    service.images.let_go(held)
    with pytest.raises(Unavailable, match="send it again"):
        await service.images.import_upload(held, "x.tar", ())


async def test_an_upload_outlives_a_restart_and_is_taken_in_once_more(service: Service) -> None:
    held = await service.images.hold(await finished(service.images.stage(100), b"one"))
    operation = replace(LATE, parameters={"upload": held, "filename": "x.tar", "aliases": ["web"]})
    await service.store.write(lambda transaction: operation_rows.add(transaction, operation))
    for _ in range(2):
        again = Images(service.store, service.fleet, service.files, (), ManualClock(), b"key")
        (service.directory / ("0" * 64)).write_bytes(b"a crash came before its row")
        await again.sweep()
        assert service.files.fingerprints() == [held]
        assert (await again.import_upload(held, "x.tar", ("web",))).aliases == ("web",)
    await service.store.write(lambda transaction: operation_rows.rows.delete(transaction, operation.id))
    await again.sweep()
    assert service.files.fingerprints() == list(service.fleet.images) == [held]


async def test_a_refused_upload_leaves_that_of_another_alone(service: Service) -> None:
    await service.upload(b"two", "taken")
    one, other = [
        await service.images.hold(await finished(service.images.stage(100), content)) for content in (b"one", b"one")
    ]
    with pytest.raises(Conflict):
        await service.images.import_upload(one, "x.tar", ("taken",))
    assert (await service.images.import_upload(other, "x.tar", ())).fingerprint == other


async def test_what_is_no_image_is_refused_and_gone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_path: Path) -> ImageFacts:
        raise InvalidRequest("no image")

    monkeypatch.setattr(images_module, "inspect", refuse)
    with pytest.raises(InvalidRequest):
        await service.upload(b"junk")


async def test_an_image_is_forgotten_with_its_file(service: Service) -> None:
    image = await service.upload(b"one")
    await service.images.forget(image.fingerprint)
    await service.images.forget(image.fingerprint)
    assert not service.fleet.images and service.files.fingerprints() == []


# ---------------------------------------------------------------- tickets


async def test_a_ticket_opens_one_file_for_one_operation(service: Service) -> None:
    image, other = await service.upload(b"one"), await service.upload(b"two")
    ticket = service.images.ticket(image.fingerprint, "op-1")
    assert service.images.file_for(image.fingerprint, ticket).read_bytes() == b"one"
    for fingerprint, text in (
        (other.fingerprint, ticket),
        (image.fingerprint, ticket.replace("op-1", "op-2")),
        (image.fingerprint, ""),
        (image.fingerprint, "op-1.ü"),
        ("../../controller.db", ticket),
    ):
        with pytest.raises(Forbidden):
            service.images.file_for(fingerprint, text)
    await service.images.forget(image.fingerprint)
    with pytest.raises(NotFound):
        service.images.file_for(image.fingerprint, ticket)


async def test_a_ticket_is_good_when_the_controller_has_restarted(service: Service) -> None:
    image = await service.upload(b"one")
    ticket = service.images.ticket(image.fingerprint, "op-1")

    def restarted(key: bytes) -> Images:
        return Images(service.store, service.fleet, service.files, (service.builder,), ManualClock(), key)

    assert restarted(b"key").file_for(image.fingerprint, ticket).read_bytes() == b"one"
    with pytest.raises(Forbidden):
        restarted(b"another").file_for(image.fingerprint, ticket)
