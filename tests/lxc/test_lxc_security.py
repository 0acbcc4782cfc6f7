"""What a container, its image and its configuration try, and do not get."""

from __future__ import annotations

import fcntl
import io
import os
import platform
import struct
import tarfile
from pathlib import Path

import pytest

from agent.drivers.lxc import config as lxc_config
from agent.drivers.lxc.seccomp import IOCTLS
from common.errors import InvalidRequest, TooLarge
from tests.helpers.busybox import busybox_archive, fingerprint_of, with_files
from tests.lxc.conftest import Node

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(120)]
EPERM = 1


def program(request: int, call: str) -> bytes:
    """An x86-64 program: open("/") and ioctl(fd, request, zeros with a name); its exit code is the errno."""
    base = 0x400000
    code = b""
    data = base + 0x1000
    code += b"\xb8" + struct.pack("<I", 2) + b"\xbf" + struct.pack("<I", data) + b"\x31\xf6\x0f\x05"  # open
    if call == "i386":
        code += b"\x89\xc3\xb9" + struct.pack("<I", request & 0xFFFFFFFF)
        code += b"\xba" + struct.pack("<I", data + 16) + b"\xb8" + struct.pack("<I", 54) + b"\xcd\x80"
    else:
        number = 16 | (0x40000000 if call == "x32" else 0)
        code += b"\x48\x89\xc7\x48\xbe" + struct.pack("<Q", request) + b"\xba" + struct.pack("<I", data + 16)
        # The descriptor is also the first field: the source of a snapshot.
        code += b"\x48\x89\x3a" + b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"
    code += b"\xf7\xd8\x89\xc7\xb8" + struct.pack("<I", 60) + b"\x0f\x05"
    name = b"nested"
    content = b"/\0".ljust(16, b"\0") + bytes(8) + name.ljust(48, b"\0") + name.ljust(4040, b"\0")
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + 0x100, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, base, base, 0x1000 + len(content), 0x1000 + len(content), 0x1000)
    return (header + segment).ljust(0x100, b"\0") + code.ljust(0xF00, b"\0") + content


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for x86-64")
async def test_no_nested_subvolume_escapes_the_disk_limit(node: Node) -> None:
    high = 0x12345 << 32
    tries = {
        f"{name}-{call}-{bits}": program(IOCTLS[name] | extra, call)
        for name in IOCTLS
        for call, bits, extra in (
            ("native", "plain", 0),
            ("native", "high", high),
            ("i386", "plain", 0),
            ("x32", "plain", 0),
        )
    }
    harmless = program(0xC0C89425, "native")  # BTRFS_IOC_SET_RECEIVED_SUBVOL
    files = {f"try/{name}": (0o755, content) for name, content in (tries | {"harmless": harmless}).items()}
    image = await node.have_image(archive=with_files(busybox_archive(), files))
    await node.driver.create(node.spec(limits__disk="100MiB"), image)
    await node.driver.start("101")
    script = "cd /try; for name in *; do ./$name; echo $name $?; done"
    found = dict(line.split() for line in node.attach("101", "sh", "-c", script).stdout.splitlines())
    assert found.keys() == tries.keys() | {"harmless"}
    assert int(found.pop("harmless")) not in (0, EPERM), "other requests reach the file system"
    # Where the kernel has no i386 or x32 calls, they end otherwise; never by success.
    assert {name: code for name, code in found.items() if "native" in name and int(code) != EPERM} == {}
    assert "0" not in found.values()
    assert not (node.rootfs() / "nested").exists()


async def test_the_program_of_that_test_would_work(node: Node) -> None:
    """Outside of a container the same call makes a subvolume: the test above can fail."""
    place = node.config.state / "pool"
    here = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(here, IOCTLS["BTRFS_IOC_SUBVOL_CREATE"], bytearray(struct.pack("=q4088s", 0, b"nested")))
    finally:
        os.close(here)
    assert (place / "nested").stat().st_ino == 256


async def test_no_escape_from_the_cgroup(node: Node) -> None:
    await node.running(limits__memory="64MiB", limits__processes="40")
    files = "-name memory.limit_in_bytes -o -name memory.max -o -name pids.max"
    script = f"for f in $(find /sys/fs/cgroup {files}); do echo max > $f; echo -1 > $f; done"
    node.attach("101", "sh", "-c", script)
    assert node.driver.sample(["101"])[0].memory_limit == 64 * 2**20


HOSTILE_NAMES = ["../../../../../../{out}/evil", "/{out}/evil", "a/../../../../../{out}/evil"]


def _tar(*entries: tuple[str, bytes, str, bytes]) -> bytes:
    """(name, type, link target, content) as an archive."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, target, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size, entry.mode = kind, target, len(content), 0o777
            entry.devmajor, entry.devminor = 1, 3
            tar.addfile(entry, io.BytesIO(content))
    return output.getvalue()


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("layout", ["rootfs", "unified"])
async def test_hostile_archives_touch_nothing_outside(node: Node, privileged: bool, layout: str) -> None:
    outside = node.config.state / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    (outside / "precious").write_text("x")
    (outside / "precious").chmod(0o666)
    out = str(outside).lstrip("/")
    archives = [
        *(_tar((name.format(out=out), tarfile.REGTYPE, "", b"evil")) for name in HOSTILE_NAMES),
        _tar(("rootfs", tarfile.SYMTYPE, f"/{out}", b""), ("rootfs/evil", tarfile.REGTYPE, "", b"evil")),
        _tar(("l", tarfile.SYMTYPE, f"/{out}", b""), ("l/evil", tarfile.REGTYPE, "", b"evil")),
        _tar(("l", tarfile.SYMTYPE, "../" * 12 + out, b""), ("l/evil", tarfile.REGTYPE, "", b"evil")),
        _tar(("h", tarfile.LNKTYPE, f"/{out}/precious", b""), ("h", tarfile.REGTYPE, "", b"evil")),
        _tar(("h", tarfile.LNKTYPE, "../" * 12 + out + "/precious", b"")),
        _tar(("null", tarfile.CHRTYPE, "", b"")),
        _tar(("image.json", tarfile.REGTYPE, "", b'{"halt_signal":"SIGKILL","size":0}')),
        b"no archive at all" * 1000,
        b"\x1f\x8b" + b"\0" * 1000,
    ]
    for content in archives:
        file = node.config.state / "hostile.tar"
        file.write_bytes(content)
        name = fingerprint_of(content)
        try:
            await node.driver.unpack_image(name, layout, file, privileged, lambda stage, percent: None)
        except InvalidRequest:
            assert not await node.driver.has_image(name, privileged)
        assert [path.name for path in outside.iterdir()] == ["precious"]
        assert (outside / "precious").read_text() == "x"
        assert (outside / "precious").stat().st_nlink == 1
    devices = [path for path in (node.config.state / "pool/images").rglob("null") if path.is_char_device()]
    assert devices == []
    for path in (node.config.state, outside):
        for leftover in (path / "hostile.tar", path / "precious"):
            leftover.unlink(missing_ok=True)
    outside.rmdir()


async def test_an_archive_that_grows_too_far_is_stopped(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.drivers.lxc.images.MAX_ENTRIES", 100)
    many = _tar(*((f"file{number}", tarfile.REGTYPE, "", b"") for number in range(5000)))
    with pytest.raises(TooLarge):
        await node.have_image(archive=many)
    monkeypatch.setattr("agent.drivers.lxc.images.MAX_FILE", 1000)
    with pytest.raises((TooLarge, InvalidRequest)):
        await node.have_image(archive=_tar(("big", tarfile.REGTYPE, "", b"x" * 5000)))
    assert list((node.config.state / "pool/staging").iterdir()) == []


@pytest.mark.parametrize("value", ["a\nlxc.hook.pre-start = /bin/true", "a\rb", "a\0b", "a\u2028b", "a\x85b"])
def test_no_value_becomes_a_line_of_configuration(value: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        lxc_config.write(tmp_path / "config", [("lxc.environment", f"X={value}")])
    assert list(tmp_path.iterdir()) == []


async def test_odd_values_arrive_as_they_are(node: Node) -> None:
    values = {"A": "  spaces  ", "B": '"quoted"', "C": "it's # no comment", "D": "x=y", "E": "", "F": "'", "G": "é\\n"}
    await node.driver.create(node.spec(**{f"environment__{name}": value for name, value in values.items()}), node.image)
    await node.driver.start("101")
    pid = (await node.driver.inspect("101")).pid
    found = dict(line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line)
    assert {name: found.get(name) for name in values} == values


async def test_a_copy_shares_no_machine_id(node: Node) -> None:
    files = {"etc/machine-id": (0o444, b"0" * 32 + b"\n")}
    image = await node.have_image(archive=with_files(busybox_archive(), files))
    await node.driver.create(node.spec(), image)
    await node.driver.copy(node.spec("102"), "101", None)
    ids = {(node.rootfs(id) / "etc/machine-id").read_text() for id in ("101", "102")} | {"0" * 32 + "\n"}
    assert len(ids) == 3


async def test_a_trap_in_place_of_the_hostname_is_replaced(node: Node) -> None:
    precious = node.config.state / "precious"
    precious.write_text("x")
    image = await node.have_image()
    await node.driver.create(node.spec(), image)
    trap = node.rootfs() / "etc/hostname"
    trap.unlink()
    trap.symlink_to(precious)
    await node.driver.start("101")
    assert precious.read_text() == "x"
    assert trap.read_text() == "host-101\n"
    assert not trap.is_symlink()
    precious.unlink()
