"""Images from elsewhere, through the API: image servers, URLs, split uploads; what they leave when they fail."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.helpers.api import effects, name, nothing_happens
from tests.helpers.cluster import Cluster, cluster, until
from tests.helpers.streams import (
    SplitImage,
    Streams,
    archive,
    metadata_of,
    root,
    server_authority,
    sha256,
    split_image,
    streams_server,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Streams]:
    with streams_server(tmp_path_factory.mktemp("streams")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def remote(tmp_path_factory: pytest.TempPathFactory, streams: Streams) -> AsyncIterator[Cluster]:
    """A fleet whose one image server is the test's; what it has is asked for each time."""
    directory = tmp_path_factory.mktemp("remote")
    (directory / "ca.pem").write_text(server_authority().ca)
    settings: dict[str, Any] = {"image_servers": {"images": streams.url}, "image_ca": directory / "ca.pem"}
    async with cluster(directory, nodes=2, image_index_lifetime=0.001, **settings) as made:
        yield made


def offer(streams: Streams, serial: str = "1", product: str = "", **options: Any) -> tuple[str, SplitImage]:
    """A new product's alias, and its image."""
    product = product or f"tiny:{name('r')}:amd64:default"
    image = streams.add(product, serial, split_image(f"{product} {serial}", **options))
    return "/".join(product.split(":")[:2]), image


async def aliases(fleet: Cluster) -> dict[str, str]:
    """The fingerprint of each alias."""
    images = (await fleet.call("GET", "/1.0/images?recursion=1"))["metadata"]
    return {alias["name"]: image["fingerprint"] for image in images for alias in image["aliases"]}


def left(fleet: Cluster) -> list[str]:
    """Files that are being written, or belong to no image."""
    directory = fleet.settings.state / "images"
    known = fleet.app.fleet.images
    return [path.name for path in directory.rglob("*") if path.is_file() and path.name not in known]


# ---------------------------------------------------------------- creating from a server


@pytest.mark.parametrize(
    "source",
    [
        lambda alias: {"alias": alias},
        lambda alias: {"alias": f"images:{alias}"},
        lambda alias: {"alias": alias, "server": "images", "protocol": "simplestreams", "mode": "pull"},
        lambda alias: {"alias": f"{alias}/amd64", "server": "images"},
        lambda alias: {"properties": {"os": "tiny", "release": alias.partition("/")[2]}},
    ],
)
async def test_a_container_from_a_server_names_what_it_asked_for_and_got(
    remote: Cluster, streams: Streams, source: Any
) -> None:
    alias, image = offer(streams, "20260101")
    container, asked = name(), source(alias)
    await remote.done("POST", f"/1.0/vz/{container}", {"source": {"type": "image", **asked}, "start": True})
    shown = (await remote.show(container))["image"]
    assert (shown["fingerprint"], shown["serial"], shown["server"]) == (image.fingerprint, "20260101", "images")
    wanted = asked.get("properties") or {"alias": asked["alias"].removeprefix("images:")}
    assert wanted.items() <= shown.items()
    kept = remote.app.fleet.images[image.fingerprint]
    assert (kept.layout, kept.rootfs_offset, kept.cached) == ("split", len(image.metadata), True)
    assert kept.size == len(image.metadata) + len(image.root)
    assert (kept.properties["os"], kept.properties["architecture"]) == ("Tiny", "x86_64")
    assert kept.origin is not None and kept.origin.server == streams.url
    assert kept.last_used_at is not None
    assert "image.ensure" in effects(remote, image.fingerprint)
    assert left(remote) == []


async def test_many_creations_wait_for_one_download(remote: Cluster, streams: Streams) -> None:
    alias, _ = offer(streams, filler=300_000)
    streams.held["root.tar.xz"] = threading.Event()
    streams.answering.clear()
    body = {"source": {"type": "image", "alias": alias}}
    accepted = [await remote.call("POST", f"/1.0/vz/{name()}", body, 202) for _ in range(5)]
    await asyncio.to_thread(streams.answering.wait, 10)

    async def downloading() -> bool:
        shown = [(await remote.call("GET", each["operation"]))["metadata"]["metadata"] for each in accepted]
        notes = [each["progress"] for each in shown if each and "progress" in each]
        return len(notes) == 5 and all(note["stage"] == "downloading" for note in notes)

    await until(downloading, "all tell of the download")
    streams.held.pop("root.tar.xz").set()
    for each in accepted:
        ended = (await remote.call("GET", f"{each['operation']}/wait?timeout=20"))["metadata"]
        assert ended["status"] == "Success", ended
    path = alias.replace("/", "/") + "/amd64/default/1/root.tar.xz"
    assert streams.asked(path) == 1


async def test_a_name_of_here_goes_before_a_servers(remote: Cluster, streams: Streams) -> None:
    alias, image = offer(streams)
    local = archive(root("local"))
    await remote.done("POST", f"/1.0/images?alias={alias}", content=local)
    for source, fingerprint in (({}, sha256(local)), ({"server": "images"}, image.fingerprint)):
        container = name()
        await remote.done("POST", f"/1.0/vz/{container}", {"source": {"type": "image", "alias": alias, **source}})
        assert (await remote.show(container))["image"]["fingerprint"] == fingerprint


async def test_one_file_with_both_parts_is_taken_too(remote: Cluster, streams: Streams) -> None:
    release = name("r")
    content = archive({"metadata.yaml": metadata_of("tiny", release), **root(release, "rootfs/")}, "gz")
    fingerprint = streams.add_unified(f"tiny:{release}:amd64:default", "1", content)
    container = name()
    await remote.done("POST", f"/1.0/vz/{container}", {"source": {"type": "image", "alias": f"tiny/{release}"}})
    assert (await remote.show(container))["image"]["fingerprint"] == fingerprint
    assert remote.app.fleet.images[fingerprint].layout == "unified"


async def failed(fleet: Cluster, alias: str, **source: str) -> str:
    """Why a creation fails in its operation, leaving a failed container, which is then deleted."""
    container = name()
    body = {"source": {"type": "image", "alias": alias, **source}}
    operation = await fleet.operation("POST", f"/1.0/vz/{container}", body)
    assert operation["status"] == "Failure", operation
    shown = await fleet.show(container)
    assert shown["status"]["status"] == "Error" and operation["err"] in shown["status"]["reason"]
    await fleet.done("DELETE", f"/1.0/vz/{container}")
    assert left(fleet) == []
    return str(operation["err"])


async def test_why_a_server_gave_nothing_is_told(remote: Cluster, streams: Streams) -> None:
    alias, image = offer(streams)
    base = f"images/{alias}/amd64/default/1"
    good = streams.files[f"{base}/root.tar.xz"]
    assert "no image for alias 'tiny/none'" in await failed(remote, "tiny/none")
    streams.files[f"{base}/root.tar.xz"] = good[:-1] + bytes([good[-1] ^ 1])
    assert "its sha256 is" in await failed(remote, alias)
    streams.files[f"{base}/root.tar.xz"] = good + b"x"
    assert "were expected" in await failed(remote, alias)
    streams.files[f"{base}/root.tar.xz"] = good
    streams.redirects[f"{base}/root.tar.xz"] = "http://localhost/root.tar.xz"
    assert "only https" in await failed(remote, alias)
    streams.redirects.clear()
    items = streams.products[f"{alias.replace('/', ':')}:amd64:default"]["versions"]["1"]["items"]
    items["lxd.tar.xz"]["combined_rootxz_sha256"] = "0" * 64
    assert "the sha256 differs" in await failed(remote, alias)
    items["lxd.tar.xz"]["combined_rootxz_sha256"] = image.fingerprint
    await remote.done("POST", f"/1.0/vz/{name()}", {"source": {"type": "image", "alias": alias}})


async def test_what_is_no_root_file_system_is_refused(remote: Cluster, streams: Streams) -> None:
    for number, made in enumerate(
        (
            SplitImage(archive({"metadata.yaml": metadata_of("tiny", "1")}), archive({"readme": b"nothing"})),
            SplitImage(archive({"readme": b"no metadata"}), archive(root("x"))),
            SplitImage(archive({"metadata.yaml": b"- a list"}), archive(root("y"))),
            SplitImage(archive({"metadata.yaml": metadata_of("tiny", "1")}), b"\xfd7zXZ\x00 damaged" * 50),
        )
    ):
        release = name(f"r{number}")
        streams.add(f"tiny:{release}:amd64:default", "1", made)
        await failed(remote, f"tiny/{release}")
        assert made.fingerprint not in remote.app.fleet.images


async def test_a_server_out_of_reach_is_named_and_what_was_fetched_before_will_do(
    remote: Cluster, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.images.download.backoff", lambda _attempt: 0.01)
    monkeypatch.setattr(remote.app.engine._resources.servers._downloads, "_pause", lambda _attempt: 0.01)
    alias, image = offer(streams)
    await remote.done("POST", f"/1.0/vz/{name()}", {"source": {"type": "image", "alias": alias}})
    streams.down = True
    try:
        why = await failed(remote, "tiny/other")
        assert f"image server images ({streams.url})" in why and "answered 503" in why
        properties = {"os": "tiny", "release": alias.partition("/")[2]}
        for source in ({"alias": alias}, {"alias": f"{alias}/amd64"}, {"properties": properties}):
            container = name()
            await remote.done("POST", f"/1.0/vz/{container}", {"source": {"type": "image", **source}})
            assert (await remote.show(container))["image"]["fingerprint"] == image.fingerprint
    finally:
        streams.down = False


async def test_an_image_of_another_architecture_gets_nowhere(remote: Cluster, streams: Streams) -> None:
    release = name("r")
    image = streams.add(f"tiny:{release}:arm64:default", "1", split_image(release))
    async with nothing_happens(remote):
        source = {"type": "image", "alias": f"tiny/{release}/arm64"}
        answer = await remote.refused("POST", f"/1.0/vz/{name()}", {"source": source}, 409)
        assert "aarch64" in answer["error"]
    container = name()
    source = {"type": "image", "fingerprint": image.fingerprint, "server": "images"}
    operation = await remote.operation("POST", f"/1.0/vz/{container}", {"source": source})
    assert operation["status"] == "Failure" and "aarch64" in operation["err"]
    await remote.done("DELETE", f"/1.0/vz/{container}")


async def test_sources_that_are_refused_at_once(remote: Cluster, streams: Streams) -> None:
    operator = {"Authorization": f"Bearer {await remote.make_token(name(), 'operator')}"}
    async with nothing_happens(remote):
        for source, code, field in (
            ({"alias": "x", "server": "nobody"}, 404, "source.server"),
            ({"alias": "x", "server": "http://localhost"}, 400, "source.server"),
            ({"alias": "x", "server": "https://localhost/?x=y"}, 400, "source.server"),
            ({"alias": "x", "server": "images", "protocol": "lxd"}, 400, "source.protocol"),
            ({"alias": "x", "fingerprint": "0" * 64, "server": "images"}, 400, "source"),
            ({"fingerprint": "xyz", "server": "images"}, 400, "source.fingerprint"),
            ({"fingerprint": "0" * 64}, 404, "source.fingerprint"),
        ):
            body = {"source": {"type": "image", **source}}
            answer = await remote.refused("POST", f"/1.0/vz/{name()}", body, code)
            assert answer["metadata"]["field"] == field, source
        body = {"source": {"type": "image", "alias": "x", "server": "https://localhost:1"}}
        await remote.refused("POST", f"/1.0/vz/{name()}", body, 403, headers=operator)


# ---------------------------------------------------------------- having images


async def test_an_image_is_pulled_as_lxd_clients_ask_for_it(remote: Cluster, streams: Streams) -> None:
    release, alias = name("r"), name("alias")
    image = streams.add(f"tiny:{release}:amd64:default", "7", split_image(release))
    source = {
        **dict.fromkeys(("certificate", "fingerprint", "image_type", "name", "project", "secret", "url"), ""),
        "alias": f"tiny/{release}",
        "mode": "pull",
        "protocol": "simplestreams",
        "server": streams.url,
        "type": "image",
    }
    body = {
        "aliases": [{"name": alias, "description": "tiny"}],
        "auto_update": True,
        "compression_algorithm": "",
        "expires_at": "0001-01-01T00:00:00Z",
        "filename": "",
        "profiles": None,
        "properties": {"mine": "yes"},
        "public": True,
        "source": source,
    }
    operation = await remote.done("POST", "/1.0/images", body)
    assert operation["kind"] == "image.pull" and operation["metadata"]["fingerprint"] == image.fingerprint
    kept = remote.app.fleet.images[image.fingerprint]
    assert (kept.aliases, kept.public, kept.auto_update, kept.cached) == ((alias,), True, True, False)
    assert (kept.properties["mine"], kept.properties["serial"], kept.expires_at) == ("yes", "7", None)
    shown = (await remote.call("GET", f"/1.0/images/{image.fingerprint}"))["metadata"]
    assert shown["aliases"] == [{"name": alias, "description": "tiny"}] and shown["auto_update"]
    assert shown["update_source"] == {"protocol": "simplestreams", "server": streams.url, "alias": f"tiny/{release}"}
    await remote.call("PATCH", f"/1.0/images/{image.fingerprint}", {"auto_update": False})
    await remote.call("PUT", f"/1.0/images/{image.fingerprint}", shown)
    anyone = {"headers": {"Authorization": ""}}
    public = (await remote.call("GET", f"/1.0/images/{image.fingerprint}", **anyone))["metadata"]
    assert public == {**shown, "update_source": None}
    await remote.done("POST", "/1.0/images", {**body, "aliases": None})
    assert remote.app.fleet.images[image.fingerprint].aliases == (alias,)
    assert left(remote) == []


async def test_what_a_url_leads_to_is_had_by_an_admin(remote: Cluster, streams: Streams) -> None:
    content = archive({"metadata.yaml": metadata_of("tiny", "2"), **root(name(), "rootfs/")}, "gz")
    streams.files["some/image.tar.gz"] = content
    url, alias = f"{streams.url}/some/image.tar.gz", name("alias")
    body = {"source": {"type": "url", "url": url, "fingerprint": sha256(content)}, "alias": alias}
    operation = await remote.done("POST", "/1.0/images", body)
    assert operation["metadata"]["fingerprint"] == sha256(content) == (await aliases(remote))[alias]
    wrong = {"source": {"type": "url", "url": url, "fingerprint": "0" * 64}}
    operation = await remote.operation("POST", "/1.0/images", wrong)
    assert operation["status"] == "Failure" and "its sha256 is" in operation["err"]
    operator = {"Authorization": f"Bearer {await remote.make_token(name(), 'operator')}"}
    await remote.refused("POST", "/1.0/images", body, 403, headers=operator)
    assert left(remote) == []


async def test_pulls_that_are_refused_at_once(remote: Cluster, streams: Streams) -> None:
    taken = name("alias")
    await remote.done("POST", f"/1.0/images?alias={taken}", content=archive(root(name())))
    good = {"type": "image", "server": "images", "alias": "tiny/1"}
    async with nothing_happens(remote):
        for body, code, field in (
            ({}, 400, "source"),
            ({"source": {"type": "carrier pigeon"}}, 400, "source.type"),
            ({"source": {"type": "url", "url": "http://localhost/x"}}, 400, "source.url"),
            ({"source": {"type": "url", "url": "https://localhost/x", "fingerprint": "1"}}, 400, "source.fingerprint"),
            ({"source": {"type": "url", "url": "https://localhost/x"}, "auto_update": True}, 400, "auto_update"),
            ({"source": {"type": "image", "alias": "tiny/1"}}, 400, "source.server"),
            ({"source": {**good, "fingerprint": "0" * 64}}, 400, "source"),
            ({"source": {**good, "protocol": "lxd"}}, 400, "source.protocol"),
            ({"source": {**good, "mode": "push"}}, 400, "source.mode"),
            ({"source": good, "alias": taken}, 409, "alias"),
            ({"source": good, "alias": "a b"}, 400, "alias"),
            ({"source": good, "properties": {"a": "b\nc"}}, 400, "properties.a"),
            ({"source": good, "colour": "red"}, 400, "colour"),
        ):
            answer = await remote.refused("POST", "/1.0/images", body, code)
            assert answer["metadata"]["field"] == field, (body, answer)
        await remote.refused("POST", "/1.0/images", {"source": good, "filename": "x" * 2**20}, 413)


async def test_a_cancelled_pull_leaves_nothing(remote: Cluster, streams: Streams) -> None:
    alias, image = offer(streams, filler=300_000)
    streams.held["root.tar.xz"] = threading.Event()
    streams.answering.clear()
    body = {"source": {"type": "image", "server": "images", "alias": alias}}
    accepted = await remote.call("POST", "/1.0/images", body, 202)
    await asyncio.to_thread(streams.answering.wait, 10)
    await remote.call("DELETE", accepted["operation"])
    ended = (await remote.call("GET", f"{accepted['operation']}/wait?timeout=10"))["metadata"]
    streams.held.pop("root.tar.xz").set()
    assert ended["status"] == "Cancelled" and image.fingerprint not in remote.app.fleet.images
    assert left(remote) == []


async def test_a_pull_goes_on_when_the_controller_is_back(remote: Cluster, streams: Streams) -> None:
    alias, image = offer(streams, filler=300_000)
    streams.held["root.tar.xz"] = threading.Event()
    streams.answering.clear()
    body = {"source": {"type": "image", "server": "images", "alias": alias}, "alias": (own := name("alias"))}
    accepted = await remote.call("POST", "/1.0/images", body, 202)
    await asyncio.to_thread(streams.answering.wait, 10)
    await remote.stop_controller()
    streams.held.pop("root.tar.xz").set()
    await remote.start_controller()
    ended = (await remote.call("GET", f"{accepted['operation']}/wait?timeout=20"))["metadata"]
    assert ended["status"] == "Success", ended
    assert (await aliases(remote))[own] == image.fingerprint and left(remote) == []
    for node in remote.agents:
        await remote.wait_for_node(node, "Online")


# ---------------------------------------------------------------- split uploads


def multipart(parts: dict[str, bytes]) -> dict[str, Any]:
    """A body in parts with its header."""
    pieces = []
    for part, content in parts.items():
        head = f'--xyz\r\nContent-Disposition: form-data; name="{part}"; filename="{part}.tar.xz"\r\n'
        pieces.append(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + content + b"\r\n")
    return {
        "content": b"".join(pieces) + b"--xyz--\r\n",
        "headers": {"Content-Type": "multipart/form-data; boundary=xyz"},
    }


async def test_a_split_image_is_uploaded_and_used(remote: Cluster) -> None:
    image, alias, container = split_image(name(), filler=2_000_000), name("alias"), name()
    sent = multipart({"metadata": image.metadata, "rootfs": image.root})
    operation = await remote.done("POST", f"/1.0/images?alias={alias}", None, **sent)
    assert operation["metadata"]["fingerprint"] == image.fingerprint
    shown = (await remote.call("GET", f"/1.0/images/{image.fingerprint}"))["metadata"]
    assert shown["properties"]["release"] == "1" and shown["layout"] == "split"
    file = remote.settings.state / "images" / image.fingerprint
    assert hashlib.sha256(file.read_bytes()).hexdigest() == image.fingerprint
    await remote.done("POST", f"/1.0/vz/{container}", {"source": {"type": "image", "alias": alias}})
    assert left(remote) == []


async def test_split_uploads_that_are_refused(remote: Cluster) -> None:
    image = split_image(name())
    metadata, rootfs = image.metadata, image.root
    async with nothing_happens(remote):
        for parts in (
            {"rootfs": rootfs, "metadata": metadata},
            {"metadata": metadata},
            {"metadata": b"", "rootfs": rootfs},
            {"metadata": metadata, "rootfs": b""},
            {"metadata": metadata, "rootfs.img": rootfs},
            {"metadata": metadata, "rootfs": rootfs, "more": b"x"},
        ):
            await remote.refused("POST", "/1.0/images", None, 400, **multipart(parts))
        sent = multipart({"metadata": metadata, "rootfs": rootfs})
        await remote.refused("POST", "/1.0/images", None, 400, **{**sent, "content": sent["content"][:-10]})
        headers = {"Content-Type": "multipart/form-data"}
        await remote.refused("POST", "/1.0/images", None, 400, content=b"x", headers=headers)
        assert left(remote) == []
    wrong = multipart({"metadata": rootfs, "rootfs": metadata})
    assert (await remote.operation("POST", "/1.0/images", None, **wrong))["status"] == "Failure"
    assert left(remote) == []


# ---------------------------------------------------------------- newer versions


async def test_a_newer_version_takes_over_the_names(remote: Cluster, streams: Streams, tmp_path: Path) -> None:
    release, own, container = name("r"), name("alias"), name()
    product = f"tiny:{release}:amd64:default"
    old = streams.add(product, "1", split_image(f"{release} 1"))
    source = {"type": "image", "server": "images", "alias": f"tiny/{release}"}
    await remote.done("POST", "/1.0/images", {"source": source, "alias": own, "auto_update": True, "public": True})
    await remote.done("POST", f"/1.0/vz/{container}", {"source": {"type": "image", "alias": own}})
    operation = await remote.done("POST", f"/1.0/images/{old.fingerprint[:20]}/refresh")
    assert operation["kind"] == "image.refresh" and operation["metadata"]["refreshed"] is False
    new = streams.add(product, "2", split_image(f"{release} 2"))
    operation = await remote.done("POST", f"/1.0/images/{old.fingerprint}/refresh")
    assert operation["metadata"]["refreshed"] is True and operation["metadata"]["fingerprint"] == new.fingerprint
    assert (await aliases(remote))[own] == new.fingerprint
    kept = remote.app.fleet.images[new.fingerprint]
    assert (kept.auto_update, kept.public, kept.cached) == (True, True, False)
    remote.app.image_upkeep._remotes.obtained_at.clear()
    await remote.app.image_upkeep.look()
    await until(lambda: old.fingerprint not in remote.app.fleet.images, "the old version goes")
    await until(lambda: not (remote.settings.state / "images" / old.fingerprint).exists(), "its file goes")
    nodes = remote.app.fleet.nodes.values()
    await until(lambda: all(old.fingerprint not in (node.images or {}) for node in nodes), "it goes from the nodes")
    assert (await remote.show(container))["status"]["status"] == "Stopped"


async def test_what_has_no_newer_versions_cannot_be_refreshed(remote: Cluster) -> None:
    alias = name("alias")
    await remote.done("POST", f"/1.0/images?alias={alias}", content=archive(root(alias)))
    async with nothing_happens(remote):
        await remote.refused("POST", f"/1.0/images/{(await aliases(remote))[alias]}/refresh", None, 409)
        await remote.refused("POST", f"/1.0/images/{'0' * 64}/refresh", None, 404)
