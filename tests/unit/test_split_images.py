"""LXD's split images: two archives in one file, read by the controller, checked by the agent."""

from __future__ import annotations

import lzma
import secrets
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.checks import check_arguments
from common.commands import EnsureImage
from common.errors import InvalidRequest, TooLarge, VzfleetError
from common.reports import ImageSpec
from controller import settings as settings_module
from controller.images.inspect import MAX_METADATA_ARCHIVE, inspect_split
from controller.settings import ControllerSettings
from tests.helpers.streams import archive, metadata_of, root

METADATA = {"metadata.yaml": metadata_of("tiny", "22.10"), "templates": None, "templates/hostname.tpl": b"x"}


def written(directory: Path, metadata: bytes, rootfs: bytes) -> tuple[Path, int]:
    """The file of an image, and where its second part begins."""
    path = directory / "image"
    path.write_bytes(metadata + rootfs)
    return path, len(metadata)


@pytest.mark.parametrize("metadata", ["xz", "gz", ""])
@pytest.mark.parametrize("rootfs", ["xz", "gz", ""])
async def test_both_parts_are_read_whatever_they_are_compressed_with(
    tmp_path: Path, metadata: str, rootfs: str
) -> None:
    facts = await inspect_split(*written(tmp_path, archive(METADATA, metadata), archive(root("x"), rootfs)))
    assert (facts.layout, facts.compression, facts.architecture) == ("split", rootfs or "none", "x86_64")
    assert (facts.properties["os"], facts.properties["release"]) == ("tiny", "22.10")


@pytest.mark.parametrize(
    ("metadata", "rootfs", "error"),
    [
        (archive({"readme": b""}), archive(root("x")), InvalidRequest),
        (archive({"metadata.yaml": b"a: b"}), archive(root("x")), InvalidRequest),
        (archive({"metadata.yaml": b"&a [*a]"}), archive(root("x")), InvalidRequest),
        (archive({"metadata.yaml": None}), archive(root("x")), InvalidRequest),
        (archive({"../metadata.yaml": b"x"}), archive(root("x")), InvalidRequest),
        (archive(METADATA), archive({"readme": b""}), InvalidRequest),
        (archive(METADATA), archive(root("x", "rootfs/")), InvalidRequest),
        (archive(METADATA), archive({"bin": None, "../x": b""}), InvalidRequest),
        (archive(METADATA), archive(root("x"))[:-20], InvalidRequest),
        (archive(METADATA), b"no archive" * 100, InvalidRequest),
        (b"no archive" * 100, archive(root("x")), InvalidRequest),
        (b"", archive(root("x")), InvalidRequest),
        (archive(METADATA), b"", InvalidRequest),
        (archive(METADATA) + b"\0" * MAX_METADATA_ARCHIVE, archive(root("x")), TooLarge),
        (lzma.compress(bytes(400 * 2**20), preset=0), archive(root("x")), VzfleetError),
    ],
)
async def test_what_is_no_split_image_is_refused(
    tmp_path: Path, metadata: bytes, rootfs: bytes, error: type[VzfleetError]
) -> None:
    with pytest.raises(error):
        await inspect_split(*written(tmp_path, metadata, rootfs))


def test_the_agent_refuses_an_offset_that_makes_no_sense() -> None:
    good = ImageSpec("0" * 64, "split", 100, "/1.0/internal/images/x", secrets.token_hex(8), 50)
    check_arguments(EnsureImage(good, False))
    check_arguments(EnsureImage(replace(good, layout="rootfs", offset=0), False))
    for bad in (
        replace(good, offset=0),
        replace(good, offset=100),
        replace(good, offset=2**62),
        replace(good, layout="unified"),
        replace(good, layout="rootfs"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            check_arguments(EnsureImage(bad, False))
        assert refused.value.field == "image.offset"


def test_settings_of_image_servers_are_kept(tmp_path: Path) -> None:
    made = ControllerSettings(
        state=tmp_path, image_servers={"mine": "https://images.example"}, image_ca=tmp_path / "ca.pem"
    )
    settings_module.save(made)
    assert settings_module.load(tmp_path) == made
    assert ControllerSettings(state=tmp_path).image_servers == {"images": "https://images.linuxcontainers.org"}
