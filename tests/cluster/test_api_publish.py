"""Containers and snapshots published as images: what is accepted, what the image is, and what failures leave."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from controller.api.internal import Publication
from controller.images.deposits import Deposits
from tests.helpers.api import effects, make, name, nothing_happens, scripted
from tests.helpers.cluster import Cluster, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
NOBODY = "/1.0/internal/publications/" + "0" * 8 + "-0000-0000-0000-" + "0" * 12


def body(container: str, kind: str = "container", **fields: Any) -> dict[str, Any]:
    """Fake containers are all alike: without something of its own an image may be the same file as another."""
    return {"source": {"type": kind, "name": container}, "properties": {"of": container[:128]}, **fields}


def directory(fleet: Cluster) -> Path:
    """The controller's directory of images."""
    return fleet.app.settings.state / "images"


def incoming(fleet: Cluster) -> list[Path]:
    return list((directory(fleet) / "incoming").glob("*"))


def members(fleet: Cluster, fingerprint: str) -> dict[str, str]:
    content = (directory(fleet) / fingerprint).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        return {path: file.read().decode() for path, file in files.items() if file is not None}


async def nothing_is_left(fleet: Cluster, container: str) -> None:
    """No file and no image; the container is free."""
    assert incoming(fleet) == []
    stored = {path.name for path in directory(fleet).iterdir() if path.is_file()}
    shown = (await fleet.call("GET", "/1.0/images"))["metadata"]
    assert stored == {url.rpartition("/")[2] for url in shown}
    await fleet.done("PUT", f"/1.0/vz/{container}", {"config": {"user.free": "yes"}})


@pytest.mark.parametrize("kind", ["container", "instance"])
async def test_a_container_is_published_and_used(fleet: Cluster, kind: str) -> None:
    container, alias = await make(fleet, node="node1"), name("alias")
    said = {"release": "1 'quoted' \"twice\"", "description": f"of {container}: #1"}
    asked = body(container, kind, aliases=[{"name": alias}], properties=said, public=True, compression_algorithm="none")
    operation = await fleet.done("POST", "/1.0/images", asked)
    assert operation["kind"] == "image.publish"
    assert operation["resources"] == {"containers": [f"/1.0/vz/{container}"], "images": []}
    fingerprint = operation["metadata"]["fingerprint"]
    shown = (await fleet.call("GET", f"/1.0/images/{fingerprint}"))["metadata"]
    architecture = shown["properties"].pop("architecture")
    assert shown["properties"] == said and shown["architecture"] == architecture
    assert (shown["layout"], shown["public"], shown["filename"]) == ("unified", True, f"{container}.tar")
    assert [each["name"] for each in shown["aliases"]] == [alias]
    assert shown["size"] == operation["metadata"]["size"] == (directory(fleet) / fingerprint).stat().st_size
    assert list(members(fleet, fingerprint)) == ["metadata.yaml", "rootfs/etc/content"]
    made = await make(fleet, node="node2", source={"type": "image", "alias": alias})
    assert (await fleet.show(made))["image"] == {"alias": alias, "fingerprint": fingerprint}
    assert effects(fleet, container) == ["container.create"]
    await nothing_is_left(fleet, container)


async def test_a_snapshot_of_a_running_container(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    await fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "s0"})
    asked = body(f"{container}/s0", "snapshot", filename="mine.tar", expires_at="2100-01-01T00:00:00Z")
    operation = await fleet.done("POST", "/1.0/images", asked)
    shown = (await fleet.call("GET", f"/1.0/images/{operation['metadata']['fingerprint']}"))["metadata"]
    assert (shown["filename"], shown["public"], shown["aliases"]) == ("mine.tar", False, [])
    assert shown["expires_at"] == "2100-01-01T00:00:00.000000Z"


async def test_a_running_one_only_by_force(fleet: Cluster) -> None:
    container = await make(fleet, start=True)
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", "/1.0/images", body(container), 409)
    assert answer["metadata"]["field"] == "force"
    await fleet.done("POST", "/1.0/images", body(container, force=True))
    assert (await fleet.show(container))["status"]["status"] == "Running"


@pytest.mark.parametrize(
    ("kind", "suffix", "fields", "code", "field"),
    [
        ("container", "", {"compression_algorithm": "lzma"}, 400, "compression_algorithm"),
        ("container", "", {"auto_update": True}, 400, "auto_update"),
        ("container", "", {"aliases": [{"name": "a b\n"}]}, 400, "alias"),
        ("container", "", {"properties": {"a": "b\nc"}}, 400, "properties.a"),
        ("container", "/s0", {}, 400, "source.name"),
        ("snapshot", "", {}, 400, "source.name"),
        ("snapshot", "/..", {}, 400, "source.name"),
        ("snapshot", "/gone", {}, 404, "source.name"),
        ("container", "x", {}, 404, "source.name"),
        ("container", "\x00", {}, 400, "source.name"),
        ("magic", "", {}, 400, "source.type"),
    ],
)
async def test_what_is_refused(
    fleet: Cluster, kind: str, suffix: str, fields: dict[str, Any], code: int, field: str
) -> None:
    container = await make(fleet)
    async with nothing_happens(fleet):
        answer = await fleet.refused("POST", "/1.0/images", body(container + suffix, kind, **fields), code)
    assert answer["metadata"]["field"] == field


async def test_nothing_else_works_on_it_and_a_cancel_leaves_nothing(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", delays={"image.publish": 30.0}):
        url = (await fleet.call("POST", "/1.0/images", body(container), 202))["operation"]
        await fleet.refused("PUT", f"/1.0/vz/{container}/state", {"action": "start"}, 409)
        await fleet.call("DELETE", url)
        ended = (await fleet.call("GET", f"{url}/wait?timeout=20"))["metadata"]
    assert ended["status"] == "Cancelled"
    await nothing_is_left(fleet, container)


async def test_a_node_that_fails_leaves_nothing(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", faults=[{"command": "image.publish", "container": container, "when": "before"}]):
        assert (await fleet.operation("POST", "/1.0/images", body(container)))["status"] == "Failure"
    await nothing_is_left(fleet, container)


async def test_one_that_is_too_large_leaves_nothing(fleet: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    container = await make(fleet)
    monkeypatch.setattr(deposits(fleet), "limit", 100)
    operation = await fleet.operation("POST", "/1.0/images", body(container))
    assert operation["status"] == "Failure" and "limit of 100 bytes" in operation["err"]
    await nothing_is_left(fleet, container)


async def test_an_upload_that_is_cut_begins_anew(fleet: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    container = await make(fleet)
    cuts, receive = [2], Publication.data_received

    async def cut(handler: Any, chunk: bytes) -> None:
        await receive(handler, chunk)
        if cuts[0]:
            cuts[0] -= 1
            handler.request.connection.stream.close()

    monkeypatch.setattr(Publication, "data_received", cut)
    operation = await fleet.done("POST", "/1.0/images", body(container))
    assert cuts == [0]
    assert "metadata.yaml" in members(fleet, operation["metadata"]["fingerprint"])
    await nothing_is_left(fleet, container)


async def test_an_alias_that_is_taken_meanwhile_fails_it(fleet: Cluster) -> None:
    container, alias = await make(fleet, node="node1"), name("alias")
    with scripted(fleet, "node1", delays={"image.publish": 2.0}):
        url = (await fleet.call("POST", "/1.0/images", body(container, alias=alias), 202))["operation"]
        other = await make(fleet, node="node2")
        await fleet.done("POST", "/1.0/images", body(other, alias=alias))
        ended = (await fleet.call("GET", f"{url}/wait?timeout=20"))["metadata"]
    assert ended["status"] == "Failure" and alias in ended["err"]
    await nothing_is_left(fleet, container)


async def test_a_token_is_good_for_its_operation_while_that_waits(fleet: Cluster) -> None:
    for token in ("wrong", deposits(fleet).token(NOBODY.rpartition("/")[2])):
        headers = {"Authorization": f"Bearer {token}"}
        answer = await fleet.refused("PUT", NOBODY, None, 403, content=b"", headers=headers)
        assert answer["metadata"]["code"] == "forbidden"
    assert incoming(fleet) == []


async def test_an_agent_that_dies_packs_anew(fleet: Cluster) -> None:
    container = await make(fleet, node="node1")
    with scripted(fleet, "node1", delays={"image.publish": 2.0}):
        url = (await fleet.call("POST", "/1.0/images", body(container), 202))["operation"]

        async def begun() -> bool:
            return bool((await fleet.call("GET", url))["metadata"]["status"] == "Running")

        await until(begun, "it is under way")
        await fleet.stop_agent("node1")
    await fleet.start_agent("node1")
    ended = (await fleet.call("GET", f"{url}/wait?timeout=30"))["metadata"]
    assert ended["status"] == "Success", ended
    await nothing_is_left(fleet, container)


def deposits(fleet: Cluster) -> Deposits:
    found = fleet.app.engine._resources.deposits
    assert found is not None
    return found
