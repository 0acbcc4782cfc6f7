"""Real containers from images of other servers: LXD's split format, unpacked from the middle of its one file."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable

import pytest

from common.errors import InvalidRequest
from tests.helpers.busybox import busybox_archive, fingerprint_of, with_files
from tests.helpers.streams import archive, metadata_of
from tests.lxc.conftest import Node

pytestmark = pytest.mark.lxc
PLAIN: Callable[[bytes], bytes] = bytes


async def unpack(node: Node, metadata: bytes, root: bytes, offset: int | None = None) -> str:
    """Have the node unpack both files as one; the image's fingerprint."""
    file = node.config.state / "split"
    file.write_bytes(metadata + root)
    fingerprint = fingerprint_of(metadata + root)
    try:
        await node.driver.unpack_image(
            fingerprint, "split", file, False, lambda stage, percent: None, len(metadata) if offset is None else offset
        )
    finally:
        file.unlink()
    return fingerprint


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress, PLAIN])
async def test_a_container_runs_from_a_split_image(node: Node, compress: Callable[[bytes], bytes]) -> None:
    metadata = archive({"metadata.yaml": metadata_of("busybox", "1"), "templates": None})
    root = compress(with_files(busybox_archive(), {"etc/mark": (0o640, b"from a split image")}))
    node.image = await unpack(node, metadata, root)
    await node.running("101")
    assert node.attach("101", "cat", "/etc/mark").stdout == "from a split image"
    assert not (node.rootfs("101") / "metadata.yaml").exists()
    mark = (node.rootfs("101") / "etc/mark").stat()
    assert (mark.st_uid, mark.st_mode & 0o777) == (node.rootfs("101").stat().st_uid, 0o640)
    await node.driver.delete("101", force=True)


@pytest.mark.parametrize("offset", [1, 10**9])
async def test_an_offset_that_leads_to_no_archive_is_refused(node: Node, offset: int) -> None:
    metadata = archive({"metadata.yaml": metadata_of("busybox", "1")})
    root = lzma.compress(busybox_archive())
    with pytest.raises(InvalidRequest):
        await unpack(node, metadata, root, offset)
    assert not await node.driver.has_image(fingerprint_of(metadata + root), privileged=False)
