"""Real containers packed as images: by every compression, without what is their own, and nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from agent.drivers.base import Publication
from common.errors import Unsupported
from tests.helpers.busybox import fingerprint_of
from tests.helpers.trees import describe, difference
from tests.lxc.conftest import Node

pytestmark = pytest.mark.lxc
METADATA = b"architecture: x86_64\n"
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "none": b"metadata.yaml\0"}
OWN = ("etc/hostname", "etc/machine-id", "etc/resolv.conf")


async def published(node: Node, what: Publication) -> bytes:
    return b"".join([piece async for piece in node.driver.publish(what)])


async def made_from(node: Node, content: bytes, container: str) -> None:
    """A container of an image in the unified format."""
    file = node.config.state / "published"
    file.write_bytes(content)
    fingerprint = fingerprint_of(content)
    try:
        await node.driver.unpack_image(fingerprint, "unified", file, False, lambda stage, percent: None)
    finally:
        file.unlink()
    await node.driver.create(node.spec(container), fingerprint)


def first_id(node: Node, container: str) -> int:
    return node.rootfs(container).stat().st_uid


@pytest.mark.parametrize("compression", MAGIC)
async def test_what_is_made_of_it_is_the_same(node: Node, compression: str) -> None:
    await node.driver.create(node.spec("101"), node.image)
    root = node.rootfs("101")
    (root / "etc/machine-id").write_text("0" * 31 + "1\n")
    (root / "etc/hostname").write_text("secret-name\n")
    (root / "root/kept").write_text("kept")
    for path in (*OWN[:2], "root/kept"):
        os.chown(root / path, first_id(node, "101"), first_id(node, "101"))
    content = await published(node, Publication("101", None, METADATA, compression))
    assert content.startswith(MAGIC[compression])
    await made_from(node, content, "102")
    before, after = (describe(node.rootfs(each), first_id(node, each)) for each in ("101", "102"))
    assert difference(before, after, OWN) == ""
    assert (node.rootfs("102") / "etc/machine-id").read_text() != (root / "etc/machine-id").read_text()
    assert (node.rootfs("102") / "etc/hostname").read_text() == "host-102\n"
    for container in ("101", "102"):
        await node.driver.delete(container, force=True)


async def test_links_in_the_place_of_directories_lead_nowhere(node: Node, tmp_path: Path) -> None:
    (tmp_path / "machine-id").write_text("of the host")
    await node.driver.create(node.spec("101"), node.image)
    root = node.rootfs("101")
    shutil.rmtree(root / "etc")
    (root / "etc").symlink_to(tmp_path)
    content = await published(node, Publication("101", None, METADATA, "none"))
    assert b"of the host" not in content
    assert [path.name for path in tmp_path.iterdir()] == ["machine-id"]
    await node.driver.delete("101", force=True)


async def test_who_stops_reading_leaves_nothing_behind(node: Node) -> None:
    await node.running("101")
    reading = node.driver.publish(Publication("101", None, METADATA, "none", force=True))
    assert await anext(reading)
    await reading.aclose()  # type: ignore[attr-defined]
    assert not list((node.config.state / "pool" / "staging").glob("*"))

    async def publish() -> None:
        await published(node, Publication("101", None, METADATA, "xz", force=True))

    task = asyncio.create_task(publish())
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list((node.config.state / "pool" / "staging").glob("*"))
    await node.driver.delete("101", force=True)


async def test_without_the_program_it_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.driver.create(node.spec("101"), node.image)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(Unsupported):
        await published(node, Publication("101", None, METADATA, "zstd"))
    monkeypatch.undo()
    await node.driver.delete("101", force=True)
