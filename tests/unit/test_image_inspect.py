"""Reading what an image is: good ones of every kind, and hostile ones."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.errors import DeadlinePassed, InvalidRequest, TooLarge, VzfleetError
from controller.images import inspect as inspecting
from controller.images.inspect import inspect

METADATA = b"""\
architecture: x86_64
creation_date: 1458040200
properties:
  architecture: x86_64
  description: Ubuntu 14.04 LTS
  os: ubuntu
  release: 14.10
templates:
  /etc/hostname:
    when: [create, copy]
    template: hostname.tpl
"""
ROOT = ("bin/", "etc/", "etc/passwd", "usr/", "usr/bin/sh")


def archive(*members: str | tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of names (a directory's ends in a slash), of (name, content), or of ready entries."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member if isinstance(member, tuple) else (member, b"")
            entry = tarfile.TarInfo(name.rstrip("/"))
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return output.getvalue()


def unified(metadata: bytes = METADATA, prefix: str = "") -> bytes:
    return archive((f"{prefix}metadata.yaml", metadata), f"{prefix}rootfs/", *(f"{prefix}rootfs/{x}" for x in ROOT))


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def zstd(content: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True).stdout


@pytest.fixture
def image(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "host:image"  # A colon must not make it a remote archive.
        path.write_bytes(content)
        return path

    return write


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstd,
}


@pytest.mark.parametrize("compression", PACKERS)
async def test_unified_in_every_compression(compression: str, image: Callable[[bytes], Path]) -> None:
    facts = await inspect(image(PACKERS[compression](unified())))
    assert (facts.layout, facts.compression, facts.architecture) == ("unified", compression, "x86_64")
    assert facts.created_at == datetime(2016, 3, 15, 11, 10, tzinfo=UTC)
    assert facts.properties == {
        "architecture": "x86_64",
        "description": "Ubuntu 14.04 LTS",
        "os": "ubuntu",
        "release": "14.10",
    }


@pytest.mark.parametrize("prefix", ["", "./"])
async def test_bare_root_file_system(prefix: str, image: Callable[[bytes], Path]) -> None:
    content = archive(*(prefix + name for name in ROOT))
    facts = await inspect(image(gzip.compress(content)))
    assert (facts.layout, facts.properties, facts.architecture) == ("rootfs", {}, None)


async def test_a_merged_usr_with_links_at_the_top(image: Callable[[bytes], Path]) -> None:
    assert (await inspect(image(archive(link("bin", "usr/bin"), "usr/", "usr/bin/")))).layout == "rootfs"


async def test_names_with_dots_and_a_pax_archive(image: Callable[[bytes], Path]) -> None:
    assert (await inspect(image(unified(prefix="./")))).layout == "unified"
    pax = archive("etc/", "etc/" + "n" * 300, "usr/café\nline", format=tarfile.PAX_FORMAT)
    assert (await inspect(image(pax))).layout == "rootfs"


REFUSED: dict[str, bytes] = {
    "empty": b"",
    "text": b"#!/bin/sh\nrm -rf /\n" * 100,
    "zip": b"PK\x03\x04" + bytes(1000),
    "squashfs": b"hsqs" + bytes(1000),
    "old lzma": lzma.compress(archive(*ROOT), format=lzma.FORMAT_ALONE),
    "gzip of text": gzip.compress(b"hello" * 1000),
    "gzip of gzip": gzip.compress(gzip.compress(archive(*ROOT))),
    "cut gzip": gzip.compress(archive(*ROOT, ("etc/random", bytes(range(256)) * 400)))[:-200],
    "cut tar": archive(*ROOT, ("etc/big", bytes(100_000)))[:50_000],
    "no members": archive(),
    "no root": archive("home/", "home/user/", "notes.txt"),
    "inner folder": archive(*(f"debian/{name}" for name in ROOT)),
    "rootfs without metadata": archive("rootfs/", *(f"rootfs/{name}" for name in ROOT)),
    "metadata without rootfs": archive(("metadata.yaml", METADATA)),
    "empty rootfs": archive(("metadata.yaml", METADATA), "rootfs/", "rootfs/home/"),
    "rootfs is a link to /": archive(("metadata.yaml", METADATA), link("rootfs", "/"), "rootfs/etc/"),
    "metadata is a link": archive(link("metadata.yaml", "/etc/shadow"), "rootfs/", "rootfs/etc/"),
    "metadata is a hard link": archive(link("metadata.yaml", "/etc/shadow", tarfile.LNKTYPE), "rootfs/etc/"),
    "metadata is a folder": archive("metadata.yaml/", "rootfs/", "rootfs/etc/"),
    "climbing out": archive(*ROOT, ("etc/../../../tmp/x", b"y")),
    "climbing out at the top": archive(*ROOT, ("../x", b"y")),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_with_what_is_allowed(name: str, image: Callable[[bytes], Path]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await inspect(image(REFUSED[name]))
    error = refusal.value
    assert error.text and "\n" not in error.text
    if error.allowed and "tar archive" in error.allowed:
        for word in ("gz", "xz", "zst", "bz2", "unified", "root file system"):
            assert word in error.allowed


ALIAS_BOMB = b"a: &a [x,x]\nb: &b [*a,*a]\narchitecture: x86_64\n"
BAD_METADATA: dict[str, bytes] = {
    "aliases": ALIAS_BOMB,
    "merge keys": b"a: &a {k: v}\narchitecture: x86_64\nproperties:\n  <<: *a\n",
    "deep": b"architecture: x86_64\nproperties: " + b"[" * 20_000,
    "deep maps": b"a: " + b"{a: " * 10_000,
    "not yaml": b"\x00\x01\x02",
    "not utf-8": b"architecture: \xff\xfe\xfd",
    "a list": b"- architecture\n",
    "empty": b"",
    "no architecture": b"properties: {os: ubuntu}\n",
    "architecture is a path": b"architecture: ../../etc\n",
    "properties is a list": b"architecture: x86_64\nproperties: [os]\n",
    "nested property": b"architecture: x86_64\nproperties: {os: {a: b}}\n",
    "newline in a property": b'architecture: x86_64\nproperties: {os: "a\\nb"}\n',
    "long property": b"architecture: x86_64\nproperties: {os: " + b"x" * 2000 + b"}\n",
    "many properties": b"architecture: x86_64\nproperties:\n" + b"".join(b"  p%d: x\n" % n for n in range(100)),
    "a map as a key": b"architecture: x86_64\nproperties: {? {a: b} : c}\n",
    "date of another planet": b"architecture: x86_64\ncreation_date: 1e999\n",
    "two documents": b"architecture: x86_64\n---\narchitecture: x86_64\n",
}


@pytest.mark.parametrize("name", BAD_METADATA)
async def test_bad_metadata_is_refused_quickly(name: str, image: Callable[[bytes], Path]) -> None:
    begun = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"metadata\.yaml"):
        await inspect(image(unified(BAD_METADATA[name])))
    assert time.monotonic() - begun < 10


async def test_yaml_tags_make_no_objects(image: Callable[[bytes], Path], tmp_path: Path) -> None:
    victim = tmp_path / "made-by-yaml"
    text = b"architecture: !!python/object/apply:os.mkdir ['%s']\n" % str(victim).encode()
    with pytest.raises(InvalidRequest):
        await inspect(image(unified(text)))
    assert not victim.exists()


async def test_metadata_over_its_limit(image: Callable[[bytes], Path]) -> None:
    with pytest.raises(TooLarge, match=r"metadata\.yaml"):
        await inspect(image(unified(METADATA + b"#" * 50_000_000)))


async def test_nothing_is_unpacked(image: Callable[[bytes], Path], tmp_path: Path) -> None:
    absolute = tarfile.TarInfo(f"{tmp_path}/escaped")
    hostile = archive(
        ("metadata.yaml", METADATA), "rootfs/", "rootfs/etc/", absolute, link("rootfs/x", "/"), ("rootfs/x/y", b"")
    )
    before = sorted(Path("/").iterdir())
    assert (await inspect(image(hostile))).layout == "unified"
    assert not (tmp_path / "escaped").exists() and not Path("/y").exists()
    assert sorted(Path("/").iterdir()) == before


async def test_names_that_look_like_options(image: Callable[[bytes], Path], tmp_path: Path) -> None:
    names = ("--checkpoint-action=exec=touch x", "-f", "etc/\x1b[2J")
    assert (await inspect(image(archive(*ROOT, *names)))).layout == "rootfs"


async def test_tar_options_of_the_environment_do_not_count(
    image: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setenv("TAR_OPTIONS", f"--checkpoint=1 --checkpoint-action=exec='touch {canary}'")
    await inspect(image(unified()))
    assert not canary.exists()


async def test_too_many_members(image: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "MAX_ENTRIES", 50)
    many = archive(*ROOT, *(f"etc/{number}" for number in range(100)))
    with pytest.raises(TooLarge, match="members"):
        await inspect(image(many))


async def test_a_name_without_end(image: Callable[[bytes], Path]) -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        await inspect(image(archive("etc/", "etc/" + "n" * 100_000)))


async def test_a_bomb_ends_at_the_time_out_and_its_processes_too(image: Callable[[bytes], Path]) -> None:
    entry = tarfile.TarInfo("etc/zeros")
    entry.size = 64 * 1024**3
    content = entry.tobuf(tarfile.GNU_FORMAT)
    # 64 MiB of zeros make 64 KiB of bzip2's streams, over and over: what follows is 6 GiB in 5 KB a piece.
    block = bz2.compress(bytes(64 * 1024**2))
    path = image(bz2.compress(content) + block * 100)
    begun = time.monotonic()
    with pytest.raises(DeadlinePassed):
        await inspect(path, timeout=0.5)
    assert time.monotonic() - begun < 5
    assert processes_with(str(path)) == []


@pytest.mark.parametrize("compression", ["gz", "zst"])
async def test_a_bomb_is_refused_and_its_processes_end(compression: str, image: Callable[[bytes], Path]) -> None:
    entry = tarfile.TarInfo("etc/zeros")
    entry.size = 2 * 1024**3
    pack, block = PACKERS[compression], bytes(32 * 1024**2)
    path = image(pack(entry.tobuf(tarfile.GNU_FORMAT)) + pack(block) * 64)
    with pytest.raises(TooLarge, match="unpacks to more than"):
        await inspect(path)
    assert processes_with(str(path)) == []


async def test_what_shrinks_well_is_no_bomb(image: Callable[[bytes], Path]) -> None:
    content = archive(*ROOT, ("etc/zeros", bytes(64 * 1024**2)))
    assert (await inspect(image(gzip.compress(content, 1)))).layout == "rootfs"


async def test_a_header_that_claims_gigabytes_is_refused(image: Callable[[bytes], Path]) -> None:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 7 * 1024**3
    with pytest.raises(VzfleetError):
        await inspect(image(entry.tobuf(tarfile.GNU_FORMAT) + bytes(10240)))


async def test_a_dictionary_over_the_memory_limit_is_refused(image: Callable[[bytes], Path]) -> None:
    content = bytearray(lzma.compress(archive(*ROOT)))
    start, size = 12, (content[12] + 1) * 4
    assert content[14:16] == b"\x21\x01", "LZMA2 with one byte of properties, see the .xz format's block header"
    content[16] = 36  # A dictionary of 1 GiB.
    checksum = zlib.crc32(content[start : start + size - 4])
    content[start + size - 4 : start + size] = checksum.to_bytes(4, "little")
    with pytest.raises(InvalidRequest, match="damaged"):
        await inspect(image(bytes(content)))


def processes_with(text: str) -> list[str]:
    """Command lines of running processes that name something."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found
