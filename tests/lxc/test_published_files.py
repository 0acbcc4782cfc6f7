"""Containers packed as images: what is made from them has the same files, but nothing that is one container's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.drivers.base import Publication
from agent.publishing import metadata_yaml
from common.errors import Conflict, NotFound
from common.states import Status
from controller.images.inspect import inspect
from tests.helpers.busybox import fingerprint_of
from tests.helpers.trees import describe, difference
from tests.lxc.conftest import Node

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(120)]
both_kinds_of_storage = pytest.mark.parametrize("node", ["btrfs", "dir"], indirect=True)
MACHINE_ID = "a" * 32
OWN = ("etc/hostname", "etc/machine-id")
"""What a container has of its own; everything else is to be the same."""
FACTS = metadata_yaml("x86_64", 1_700_000_000, {"os": "tëst 'x\" #", "release": "1.10"})


def publication(snapshot: str | None = None, compression: str = "gzip", force: bool = False) -> Publication:
    return Publication("101", snapshot, FACTS, compression, force)


async def packed(node: Node, what: Publication) -> bytes:
    return b"".join([piece async for piece in node.driver.publish(what)])


async def created_from(node: Node, archive: bytes, id: str) -> Path:
    """The root of a container that is created from a packed image, which the controller takes for what it is."""
    file = node.config.state / "published"
    file.write_bytes(archive)
    facts = await inspect(file)
    assert (facts.layout, facts.architecture) == ("unified", "x86_64")
    assert (facts.properties["os"], facts.properties["release"]) == ("tëst 'x\" #", "1.10")
    image = fingerprint_of(archive)
    await node.driver.unpack_image(image, "unified", file, False, lambda stage, percent: None)
    file.unlink()
    await node.driver.create(node.spec(id, generation=2), image)
    return node.rootfs(id)


def fill(root: Path, first: int) -> None:
    """Files of many kinds, for ids inside."""
    (root / "etc" / "machine-id").write_text(f"{MACHINE_ID}\n")
    data = root / "data"
    data.mkdir(0o2750)
    with (data / "sparse").open("wb") as file:
        file.truncate(200 * 2**20)
    (data / "one").write_text("two names")
    os.setxattr(data / "one", "user.note", b"kept")
    os.link(data / "one", data / "two")
    (data / "plain").symlink_to(".hidden")
    (data / "absolute").symlink_to("/etc/passwd")
    os.chown(root / "etc" / "machine-id", first, first)
    for number, path in enumerate((data, *sorted(data.iterdir()))):
        os.chown(path, first + 1000 + number, first + 5, follow_symlinks=False)
    (data / "one").chmod(0o4755)


@both_kinds_of_storage
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd", "xz"])
async def test_what_is_created_from_it_has_its_files(node: Node, compression: str) -> None:
    await node.driver.create(node.spec(), node.image)
    root, first = node.rootfs(), node.rootfs().stat().st_uid
    fill(root, first)
    before = describe(root, first)
    made = await created_from(node, await packed(node, publication(compression=compression)), "202")
    assert difference(before, describe(made, first), OWN) == ""
    assert (made / "etc" / "hostname").read_text() == "host-202\n"
    machine_id = made / "etc" / "machine-id"
    assert machine_id.read_text().strip() not in ("", MACHINE_ID) and machine_id.stat().st_uid == first
    await node.driver.start("202")


@both_kinds_of_storage
async def test_a_running_one_only_by_force_and_a_snapshot_at_any_time(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    (node.rootfs() / "first").touch()
    await node.driver.create_snapshot("101", "one")
    await node.driver.start("101")
    (node.rootfs() / "second").touch()
    with pytest.raises(Conflict):
        await packed(node, publication())
    with pytest.raises(NotFound):
        await packed(node, publication("none"))
    snapshot = await created_from(node, await packed(node, publication("one")), "202")
    running = await created_from(node, await packed(node, publication(force=True)), "303")
    assert (await node.driver.inspect("101")).status == Status.RUNNING
    assert [(root / "first").exists() for root in (snapshot, running)] == [True, True]
    assert [(root / "second").exists() for root in (snapshot, running)] == [False, True]


@both_kinds_of_storage
async def test_one_that_is_given_up_leaves_nothing(node: Node) -> None:
    await node.running()
    pieces = node.driver.publish(publication(force=True))
    assert await anext(pieces)
    await pieces.aclose()  # type: ignore[attr-defined]
    assert list((node.rootfs().parents[2] / "staging").iterdir()) == []
    assert (await node.driver.inspect("101")).status == Status.RUNNING
