"""Image servers and what comes from them: what a source means, what is asked when, one download for all who want it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.clock import ManualClock
from common.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unsupported
from controller.fleet import Fleet
from controller.images.download import Downloads
from controller.images.files import ImageFiles
from controller.images.https import HttpsClient, make_context
from controller.images.servers import ImageServers, Keep
from controller.images.simplestreams import INDEX
from controller.live import LiveNode
from controller.records import Node
from controller.services.image_sources import ImageSources
from controller.services.images import Images
from controller.services.remotes import Remotes
from controller.services.requests import ImageSource
from controller.store.db import Database
from tests.helpers.core import CALLER, FACTS, make_template
from tests.helpers.streams import PRODUCTS, SplitImage, Streams, archive, metadata_of, root, split_image, streams_server

OPERATOR = replace(CALLER, role="operator")


class Service:
    """The services of images on an empty store, with one server."""

    def __init__(self, directory: Path, streams: Streams, **servers: str) -> None:
        self.directory = directory / "images"
        self.clock = ManualClock()
        self.fleet = Fleet(self.clock)
        self.store = Database(f"sqlite:///{directory / 'template.db'}", self.fleet.apply)
        self.files = ImageFiles(self.directory)
        images = Images(self.store, self.fleet, self.files, (), self.clock, b"key")
        downloads = Downloads(HttpsClient(make_context(directory / "image-ca.pem")), pause=lambda _attempt: 0.01)
        names = {"images": streams.url, "other": "https://localhost:1/base/", **servers}
        servers_kept = ImageServers(downloads, self.clock, 3600.0)
        self.sources = ImageSources(self.fleet, images, servers_kept, names)
        self.remotes = Remotes(
            self.store, self.fleet, self.files, images, downloads, self.clock, servers_kept, self.sources, 100 * 2**20
        )
        self.notes: list[dict[str, Any]] = []

    def node(self, name: str, architecture: str) -> None:
        """A node of an architecture."""
        record = Node(name, "k" * 40, "2026-01-01T00:00:00.000000Z", replace(FACTS, architecture=architecture))
        self.fleet.nodes[name] = LiveNode(record, since="2026-01-01T00:00:00.000000Z")

    async def obtain(self, alias: str) -> str:
        """The fingerprint of what an alias of the server means."""
        remote = self.sources.remote(ImageSource(alias=alias, server="images"), CALLER)
        return (await self.remotes.obtain(remote, self.notes.append)).image.fingerprint

    def left(self) -> list[str]:
        """Files that are no image's."""
        return [
            path.name for path in self.directory.rglob("*") if path.is_file() and path.name not in self.fleet.images
        ]


@pytest.fixture
def streams(tmp_path: Path) -> Iterator[Streams]:
    with streams_server(tmp_path) as made:
        yield made


@pytest.fixture
async def service(tmp_path: Path, streams: Streams) -> AsyncIterator[Service]:
    await asyncio.to_thread(make_template, tmp_path)
    service = Service(tmp_path, streams)
    await service.store.open()
    yield service
    await service.store.close()
    assert service.left() == []


# ---------------------------------------------------------------- what a source means


async def test_sources_and_what_they_mean(service: Service, streams: Streams) -> None:
    service.node("n1", "x86_64")
    service.node("n2", "x86_64")
    service.node("n3", "aarch64")
    for source, node, server, alias, architecture in (
        (ImageSource(alias="a/1"), None, "images", "a/1", "x86_64"),
        (ImageSource(alias="a/1"), "n3", "images", "a/1", "aarch64"),
        (ImageSource(alias="a/1/arm64"), "n1", "images", "a/1/arm64", "aarch64"),
        (ImageSource(alias="images:a/1"), None, "images", "a/1", "x86_64"),
        (ImageSource(alias="other:a/1"), None, "other", "a/1", "x86_64"),
        (ImageSource(alias="a/1", server="other"), None, "other", "a/1", "x86_64"),
        (ImageSource(alias="a/1", server="https://localhost:1/base"), None, "other", "a/1", "x86_64"),
        (ImageSource(alias="a/1", server="https://else.where/"), None, "https://else.where", "a/1", "x86_64"),
    ):
        found = service.sources.resolve(source, CALLER, node)
        assert found.remote is not None and found.fingerprint is None
        assert (found.remote.name, found.remote.wish.alias, found.architecture) == (server, alias, architecture)
        assert found.requested == {"alias": alias, "server": server}
    assert streams.requests == []


async def test_sources_that_are_refused(service: Service) -> None:
    for source, caller, error in (
        (ImageSource(alias="a", fingerprint="0" * 64), CALLER, InvalidRequest),
        (ImageSource(), CALLER, InvalidRequest),
        (ImageSource(fingerprint="0" * 64), CALLER, NotFound),
        (ImageSource(fingerprint="0" * 11, server="images"), CALLER, InvalidRequest),
        (ImageSource(fingerprint="g" * 64, server="images"), CALLER, InvalidRequest),
        (ImageSource(alias="a", server="nobody"), CALLER, NotFound),
        (ImageSource(alias="a", server="http://localhost"), CALLER, InvalidRequest),
        (ImageSource(alias="a", server="https://localhost?x"), CALLER, InvalidRequest),
        (ImageSource(alias="a", server="https://10.0.0.1"), OPERATOR, Forbidden),
        (ImageSource(alias="a", server="https://10.0.0.1"), None, Forbidden),
        (ImageSource(properties={"release": "1"}), CALLER, InvalidRequest),
    ):
        with pytest.raises(error):
            service.sources.resolve(source, caller)
    assert service.sources.resolve(ImageSource(alias="a", server="other"), OPERATOR).remote is not None


async def test_without_a_default_server_what_is_not_here_is_not_found(tmp_path: Path, streams: Streams) -> None:
    service = Service(tmp_path, streams)
    service.sources.urls.pop("images")
    for source in (ImageSource(alias="a/1"), ImageSource(properties={"os": "plan9"}), ImageSource(alias="x:y")):
        with pytest.raises(NotFound):
            service.sources.resolve(source, CALLER)


def test_a_server_without_tls_cannot_be_configured(tmp_path: Path, streams: Streams) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Service(tmp_path, streams, bad="http://localhost")
    assert refused.value.field == "image_servers.bad"


# ---------------------------------------------------------------- asking and fetching


async def test_what_a_server_has_is_asked_once_an_hour_and_read_when_it_changed(
    service: Service, streams: Streams
) -> None:
    streams.add("a:1:amd64:default", "1", split_image("1"))
    unknown = ImageSource(alias="a/2", server="images")
    assert service.sources.resolve(unknown, CALLER).remote is not None
    first = await service.obtain("a/1")
    with pytest.raises(NotFound, match="no image for alias 'a/2'"):
        service.sources.resolve(unknown, CALLER)
    service.clock.advance(3599)
    assert await service.obtain("a/1") == first
    assert (streams.asked(INDEX), streams.asked(PRODUCTS)) == (1, 1)
    service.clock.advance(2)
    assert await service.obtain("a/1") == first
    assert (streams.asked(INDEX), streams.asked(PRODUCTS)) == (2, 2)
    assert all("If-None-Match" in headers for path, headers in streams.requests[-2:])
    newer = streams.add("a:1:amd64:default", "2", split_image("2"))
    service.clock.advance(3601)
    assert await service.obtain("a/1") == newer.fingerprint


async def test_who_gives_up_takes_nothing_away_and_the_last_one_stops_it(service: Service, streams: Streams) -> None:
    image = streams.add("a:1:amd64:default", "1", split_image("1", filler=300_000))
    await service.remotes._servers.catalogue(streams.url)
    for leave in (1, 3):
        streams.held["root.tar.xz"] = threading.Event()
        streams.answering.clear()
        waiting = [asyncio.create_task(service.obtain("a/1")) for _ in range(3)]
        await asyncio.to_thread(streams.answering.wait, 10)
        for task in waiting[:leave]:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        streams.held.pop("root.tar.xz").set()
        if leave == 3:
            assert image.fingerprint not in service.fleet.images and service.left() == []
        else:
            assert await asyncio.gather(*waiting[1:]) == [image.fingerprint] * 2
            await service.remotes._images.forget(image.fingerprint)
    assert streams.asked("root.tar.xz") == 2


async def test_progress_tells_bytes_of_all_files(service: Service, streams: Streams) -> None:
    image = streams.add("a:1:amd64:default", "1", split_image("1", filler=3_000_000))
    await service.obtain("a/1")
    total = len(image.metadata) + len(image.root)
    notes = [note for note in service.notes if note["stage"] == "downloading"]
    assert len(notes) >= 3 and all(note["total"] == total for note in notes)
    assert (notes[-1]["processed"], notes[-1]["percent"]) == (total, 100)
    assert [note["processed"] for note in notes] == sorted(note["processed"] for note in notes)
    assert [service.notes[0]["stage"], service.notes[-1]["stage"]] == ["asking images", "inspecting"]


async def test_a_version_that_was_removed_meanwhile_is_one_of_before(service: Service, streams: Streams) -> None:
    old = streams.add("a:1:amd64:default", "1", split_image("1"))
    await service.remotes._servers.catalogue(streams.url)
    for path in [path for path in streams.files if path.startswith("images/")]:
        del streams.files[path]
    with pytest.raises(NotFound, match="has no /images/a/1"):
        await service.obtain("a/1")
    new = streams.add("a:1:amd64:default", "2", split_image("2"))
    assert await service.obtain("a/1") == new.fingerprint != old.fingerprint


async def test_an_image_over_the_limit_is_not_begun(service: Service, streams: Streams) -> None:
    streams.add("a:1:amd64:default", "1", split_image("1"))
    items = streams.products["a:1:amd64:default"]["versions"]["1"]["items"]
    items["root.tar.xz"]["size"] = 200 * 2**20
    with pytest.raises(Exception, match="too large"):
        await service.obtain("a/1")
    assert streams.asked("root.tar.xz") == 0


async def test_what_is_offered_otherwise_is_refused(service: Service, streams: Streams) -> None:
    streams.add("a:1:amd64:default", "1", split_image("1"))
    items = streams.products["a:1:amd64:default"]["versions"]["1"]["items"]
    items["root.squashfs"] = {**items.pop("root.tar.xz"), "ftype": "squashfs"}
    with pytest.raises(Unsupported, match="squashfs"):
        await service.obtain("a/1")


# ---------------------------------------------------------------- one's own images, and newer ones


async def test_a_pull_makes_a_cached_image_ones_own(service: Service, streams: Streams) -> None:
    image = streams.add("a:1:amd64:default", "1", split_image("1"))
    assert service.fleet.images.get(await service.obtain("a/1")) is not None
    remote = service.sources.remote(ImageSource(alias="a/1", server="images"), CALLER)
    for _ in range(2):
        await service.remotes.pull(remote, Keep(("mine",), {"os": "Mine"}, auto_update=True), service.notes.append)
    kept = service.fleet.images[image.fingerprint]
    assert (kept.aliases, kept.properties["os"], kept.cached, kept.auto_update) == (("mine",), "Mine", False, True)
    other = streams.add("a:2:amd64:default", "1", split_image("2"))
    service.clock.advance(3601)
    remote = service.sources.remote(ImageSource(alias="a/2", server="images"), CALLER)
    with pytest.raises(Conflict):
        await service.remotes.pull(remote, Keep(("mine",)), service.notes.append)
    assert service.fleet.images[other.fingerprint].cached


async def test_a_url_is_fetched_once_for_its_sha256(service: Service, streams: Streams) -> None:
    content = archive({"metadata.yaml": metadata_of("tiny", "1"), **root("x", "rootfs/")}, "gz")
    streams.files["x.tar.gz"] = content
    for _ in range(2):
        image = await service.remotes.pull_url(
            f"{streams.url}/x.tar.gz", SplitImage(content, b"").fingerprint, Keep(), print
        )
    assert image.origin is not None and image.origin.protocol == "direct" and not image.cached
    assert (image.filename, streams.asked("x.tar.gz")) == ("x.tar.gz", 1)
    with pytest.raises(Conflict, match="no newer versions"):
        service.remotes.origin_of(image)


async def test_a_newer_version_takes_over_what_was_said_of_the_old_one(service: Service, streams: Streams) -> None:
    old = streams.add("a:1:amd64:default", "1", split_image("1"))
    remote = service.sources.remote(ImageSource(fingerprint=old.fingerprint, server="images"), CALLER)
    await service.remotes.pull(remote, Keep(("mine",), public=True, auto_update=True), service.notes.append)
    assert not await service.remotes.has_newer(service.fleet.images[old.fingerprint])
    new = streams.add("a:1:amd64:default", "2", split_image("2"))
    for _ in range(2):
        got = await service.remotes.refresh(old.fingerprint, service.notes.append)
        assert (got.image.fingerprint, got.serial) == (new.fingerprint, "2")
    heir, spent = service.fleet.images[new.fingerprint], service.fleet.images[old.fingerprint]
    assert (heir.aliases, heir.public, heir.auto_update, heir.cached) == (("mine",), True, True, False)
    assert (spent.aliases, spent.auto_update, spent.cached) == ((), False, True)
    assert spent.expires_at is not None
