"""The built-in images: which is meant, and what they are made of. Debian's own build is tested on real containers."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from common.errors import DeadlinePassed, DriverFailed, InvalidRequest, NotFound
from controller.images import busybox, debian_recipe
from controller.images.builder import host_architecture
from controller.images.builders import BusyboxBuilder, DebianBuilder, find_builder
from controller.images.files import ImageFiles
from controller.images.inspect import inspect

BUILDERS = (BusyboxBuilder(), DebianBuilder())
ARCHIVES = ("http://127.0.0.1:9/debian", "http://127.0.0.1:9/debian-security")
needs_busybox = pytest.mark.skipif(shutil.which("busybox") is None, reason="needs busybox-static")


def ignore(_stage: str, _percent: int | None) -> None:
    """Nobody looks at the progress."""


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    return ImageFiles(tmp_path)


def test_the_os_chooses_the_builder() -> None:
    assert find_builder(BUILDERS, {"os": "BusyBox"}) is BUILDERS[0]
    assert find_builder(BUILDERS, {"os": "debian", "release": "12", "architecture": "x86_64"}) is BUILDERS[1]


@pytest.mark.parametrize(
    ("properties", "kind", "field", "allowed"),
    [
        ({"os": "ubuntu"}, NotFound, "os", "busybox, debian"),
        ({"release": "bookworm"}, InvalidRequest, "os", "busybox"),
        ({"os": "debian", "release": "warty"}, InvalidRequest, "release", "bookworm"),
        ({"os": "debian", "release": "../sid"}, InvalidRequest, "release", "trixie"),
        ({"os": "debian", "release": "--help"}, InvalidRequest, "release", "trixie"),
        ({"os": "debian", "variant": "cloud"}, InvalidRequest, "variant", "architecture"),
        ({"os": "busybox", "architecture": "s390x"}, InvalidRequest, "architecture", host_architecture()),
        ({"os": "busybox", "architecture": "unheard-of"}, InvalidRequest, "architecture", host_architecture()),
        ({"os": "debian", "architecture": ""}, InvalidRequest, "architecture", host_architecture()),
    ],
)
def test_what_cannot_be_built_is_refused_by_field(
    properties: dict[str, str], kind: type[InvalidRequest], field: str, allowed: str
) -> None:
    with pytest.raises(kind) as refusal:
        find_builder(BUILDERS, properties)
    assert refusal.value.field == f"source.properties.{field}"
    assert allowed in (refusal.value.allowed or "")


def test_names_of_one_debian_release_share_a_key() -> None:
    builder = DebianBuilder()
    assert builder.key({"os": "debian"}) == builder.key({"release": "12"}) == builder.key({"release": "Bookworm"})
    assert builder.key({"release": "13"}) == builder.key({"release": "trixie"}) != builder.key({"release": "12"})


def test_the_busybox_key_follows_the_binary(tmp_path: Path) -> None:
    program = tmp_path / "busybox"
    program.write_bytes(b"one")
    first = BusyboxBuilder(program).key({"os": "busybox"})
    program.write_bytes(b"another")
    assert BusyboxBuilder(program).key({"os": "busybox"}) != first
    program.unlink()
    with pytest.raises(DriverFailed, match="busybox-static"):
        BusyboxBuilder(program).key({"os": "busybox"})


def test_busybox_has_one_release(tmp_path: Path) -> None:
    program = tmp_path / "busybox"
    builder = BusyboxBuilder(program)
    program.write_bytes(b"\x7fELF BusyBox v1.35.0 (Debian 1:1.35.0-4) multi-call binary")
    keys = set()
    for release in ({}, {"release": "1.35.0"}, {"release": "latest"}, {"release": "Latest"}):
        builder.check({"os": "busybox", **release})
        keys.add(builder.key({"os": "busybox", **release}))
    assert len(keys) == 1
    for release in ("1.35", "1.36.1", "bookworm", "", "../x", "v1.35.0"):
        with pytest.raises(InvalidRequest) as refusal:
            builder.check({"os": "busybox", "release": release})
        assert refusal.value.field == "source.properties.release"
        assert refusal.value.allowed == "1.35.0 or latest"
    program.write_bytes(b"\x7fELF BusyBox v1.37.0 () another one")
    builder.check({"os": "busybox", "release": "1.37.0"})
    with pytest.raises(InvalidRequest):
        builder.check({"os": "busybox", "release": "1.35.0"})
    program.unlink()
    with pytest.raises(DriverFailed, match="busybox-static"):
        builder.check({"os": "busybox", "release": "1.37.0"})


@needs_busybox
async def test_busybox_is_a_root_file_system_with_one_fingerprint(files: ImageFiles) -> None:
    stages: list[str] = []
    first = await BusyboxBuilder().build({"os": "busybox"}, files, lambda stage, _: stages.append(stage))
    second = await BusyboxBuilder().build({"os": "busybox", "release": "latest"}, files, ignore)
    assert first.staged.fingerprint == second.staged.fingerprint
    assert stages and first.layout == "rootfs"
    assert first.properties["os"] == "busybox" and first.properties["release"][0].isdigit()
    second.staged.discard()
    kept = await files.keep(first.staged)
    facts = await inspect(kept)
    assert (facts.layout, facts.compression) == ("rootfs", "none")
    with tarfile.open(kept) as tar:
        entries = {entry.name: entry for entry in tar.getmembers()}
    assert entries["sbin/init"].isfile() and entries["sbin/init"].mode & 0o111
    assert entries["sbin/reboot"].issym() and entries["sbin/reboot"].linkname == "/bin/busybox"
    assert all(entry.uid == entry.gid == 0 and not entry.isdev() for entry in entries.values())
    assert {entry.mtime for entry in entries.values()} == {busybox.MODIFIED}
    assert stat.S_IMODE(entries["tmp"].mode) == 0o1777 and entries["etc/udhcpc/default.script"].mode & 0o111
    for name in ("sbin/udhcpc", "bin/sh", "bin/usleep", "sbin/poweroff", "dev", "proc", "sys"):
        assert name in entries, f"the recipe needs {name}"


@needs_busybox
def test_every_script_of_the_recipe_parses() -> None:
    scripts = [text for _, _, text in busybox.FILES if text.startswith("#!")]
    assert len(scripts) == 5
    for text in scripts:
        subprocess.run(["busybox", "sh", "-n"], input=text.encode(), check=True)


async def test_busybox_of_another_kind_is_refused(files: ImageFiles, tmp_path: Path) -> None:
    dynamic = tmp_path / "busybox"
    dynamic.write_bytes(b"\x7fELF /lib64/ld-linux-x86-64.so.2")
    with pytest.raises(DriverFailed, match="static"):
        await BusyboxBuilder(dynamic).build({"os": "busybox"}, files, ignore)
    with pytest.raises(DriverFailed, match="busybox-static"):
        await BusyboxBuilder(tmp_path / "absent").build({"os": "busybox"}, files, ignore)


def test_debian_is_given_updates_and_security_of_its_release() -> None:
    command = debian_recipe.make_command("bookworm", Path("/x y/overlay.tar"), ARCHIVES)
    operands = command[command.index("--", command.index("mmdebstrap")) + 1 :]
    assert operands == [
        "bookworm",
        "-",
        "deb http://127.0.0.1:9/debian bookworm main",
        "deb http://127.0.0.1:9/debian bookworm-updates main",
        "deb http://127.0.0.1:9/debian-security bookworm-security main",
    ]
    assert "--customize-hook=tar-in '/x y/overlay.tar' /" in command
    assert debian_recipe.make_command("sid", Path("/o"), ARCHIVES)[-1] == "deb http://127.0.0.1:9/debian sid main"
    assert (
        "systemd-resolved"
        not in " ".join(debian_recipe.make_command("bullseye", Path("/o"), ARCHIVES)).split("--skip")[0]
    )


def test_the_debian_overlay_holds_the_recipe() -> None:
    with tarfile.open(fileobj=io.BytesIO(debian_recipe.make_overlay())) as tar:
        assert {entry.name for entry in tar.getmembers()} == {*debian_recipe.FILES, *debian_recipe.LINKS}
        network = tar.extractfile("etc/systemd/network/eth0.network")
        assert network is not None and b"DHCP=ipv4" in network.read()


def fake_mmdebstrap(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of this name first in PATH."""
    program = directory / "bin" / "mmdebstrap"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


async def test_debian_output_and_progress(files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "root"
    (source / "etc").mkdir(parents=True)
    (source / "etc" / "os-release").write_text("ID=debian\n")
    lines = "echo 'I: running apt-get update...' >&2; echo 'I: creating tarball...' >&2"
    fake_mmdebstrap(tmp_path, f"{lines}; exec tar -C {source} -cf - .", monkeypatch)
    stages: list[tuple[str, int | None]] = []
    built = await DebianBuilder(ARCHIVES).build(
        {"os": "debian", "release": "13"}, files, lambda stage, percent: stages.append((stage, percent))
    )
    assert stages == [("fetching package lists", 5), ("packing", 90), ("packing", 100)]
    assert (built.layout, built.properties["release"]) == ("rootfs", "trixie")
    facts = await inspect(await files.keep(built.staged))
    assert (facts.layout, facts.compression) == ("rootfs", "gz")
    assert list((tmp_path / "incoming").iterdir()) == []


async def test_debian_says_why_it_failed(files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = "echo 'I: starting' >&2; echo 'E: apt-get update failed: Could not connect' >&2; echo 'I: removing' >&2"
    fake_mmdebstrap(tmp_path, f"{errors}; echo half; exit 25", monkeypatch)
    with pytest.raises(DriverFailed, match=r"code 25: E: apt-get update failed: Could not connect$"):
        await DebianBuilder(ARCHIVES).build({"os": "debian"}, files, ignore)
    assert list((tmp_path / "incoming").iterdir()) == [] and files.fingerprints() == []


async def test_debian_is_killed_at_its_time_out_with_its_children(
    files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_mmdebstrap(tmp_path, f"sleep 1000 & echo {tmp_path}; wait", monkeypatch)
    with pytest.raises(DeadlinePassed):
        await DebianBuilder(ARCHIVES, timeout=0.5).build({"os": "debian"}, files, ignore)
    assert list((tmp_path / "incoming").iterdir()) == []
    mark = f"TMPDIR={tmp_path}".encode()
    running = [path for path in Path("/proc").glob("[0-9]*/environ") if mark in _bytes(path)]
    assert running == []


async def test_debian_without_mmdebstrap(files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DriverFailed, match="apt-get install mmdebstrap"):
        await DebianBuilder(ARCHIVES).build({"os": "debian"}, files, ignore)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
