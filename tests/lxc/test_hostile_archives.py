"""Hostile image archives, through the controller's inspection and a node's real unpacking, into a container's life.

Nothing outside the pool changes, nothing is filled, nothing is left, and each ends in a harmless container or in an
error that names what is wrong.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from agent.drivers.lxc import archive, images
from common.archives import MEMORY
from common.errors import VzfleetError
from controller.images.inspect import inspect
from tests.helpers import hostile_archives, hostile_contents, hostile_unified
from tests.helpers.busybox import busybox_archive, fingerprint_of, with_files
from tests.helpers.hostile_archives import Hostile
from tests.lxc.conftest import MIB, Node, make_config, network_namespace, open_node, state_place

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]
CORPUS = hostile_unified.all_archives()
ON_DIRECTORIES = [
    *hostile_archives.names(),
    *hostile_archives.links(),
    *hostile_contents.sizes(),
    *hostile_contents.bombs(),
    *hostile_contents.traps(),
]
AS_PRIVILEGED = [*hostile_archives.links(), *hostile_archives.kinds(), *hostile_contents.attributes()]
POOL = 1024 * MIB
ENTRIES = 5_000
"""Instead of two million, with which the largest archive takes half a minute."""
LONGEST = 45.0
"""Seconds that one archive may take on a node that has other things to do; on an idle one none takes 5."""
HOST_FILES = ("/etc", "/root", "/", "/usr/bin", "/usr/sbin", "/dev", "/tmp", "/var/tmp")
# What driver and machine change there of themselves.
OTHERS = re.compile(r"/etc/(sub[ug]id|mtab).*|/(tmp|var/tmp|root)/.*|/dev/(loop|shm|pts|ptmx|tty|null).*")


@dataclass
class Place:
    """A node, and a directory on its host that everybody may write to and nobody has a reason to."""

    node: Node
    outside: Path

    @property
    def pool(self) -> Path:
        pool = self.node.config.state / "pool"
        return pool if pool.is_mount() else self.node.config.state / "volumes"

    def host(self) -> dict[str, tuple[int, ...]]:
        """The host's files by what an attack would change: those to stay, the state directory, the system's."""
        found = {}
        state = self.node.config.state
        for directory in (*map(Path, HOST_FILES), *_directories(Path("/etc")), *_directories(self.outside), state):
            for entry in os.scandir(directory):
                if not OTHERS.fullmatch(entry.path):
                    facts = entry.stat(follow_symlinks=False)
                    changed = (facts.st_size, facts.st_mtime_ns) if not entry.is_dir(follow_symlinks=False) else (0, 0)
                    found[entry.path] = (facts.st_mode, facts.st_uid, facts.st_gid, facts.st_ino, *changed)
                    if stat.S_ISREG(facts.st_mode):
                        found[entry.path] += (facts.st_nlink,)
        for entry in os.scandir(state):
            if entry.name == "pool.img":
                found.pop(entry.path, None)
        return found

    def held(self) -> tuple[list[str], list[str], list[str]]:
        """Volumes, mounts and processes."""
        volumes = [str(path) for kind in ("images", "containers", "staging") for path in (self.pool / kind).iterdir()]
        state = str(self.node.config.state)
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if state in line]
        children = [f"{child.pid} {child.name()}" for child in psutil.Process().children(recursive=True)]
        return sorted(volumes), mounts, sorted(children)


def _directories(top: Path) -> Iterator[Path]:
    for directory, _, _ in os.walk(top):
        yield Path(directory)


@pytest.fixture(autouse=True)
def fewer_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_ENTRIES", ENTRIES)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["btrfs", "dir"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """One node for all archives."""
    with state_place() as state, network_namespace() as name:
        outside = state / "outside"
        async with open_node(make_config(state, name, storage=request.param, pool_size=POOL)) as node:
            outside.mkdir()
            outside.chmod(0o777)
            (outside / "precious").write_text("precious")
            (outside / "precious").chmod(0o666)
            try:
                yield Place(node, outside)
            finally:
                assert (outside / "precious").read_text() == "precious"
                (outside / "precious").unlink()
                outside.rmdir()


async def watch_room(place: Place, lowest: list[int]) -> None:
    """Keep the lowest free space that was seen."""
    while True:
        figures = os.statvfs(place.pool)
        lowest[0] = min(lowest[0], figures.f_bavail * figures.f_frsize)
        await asyncio.sleep(0.02)


async def unpack(place: Place, case: Hostile, file: Path, fingerprint: str, privileged: bool = False) -> str:
    """Unpack an archive: what came of it, `code: text` of an error or nothing."""
    begun, lowest = time.monotonic(), [2**62]
    watcher = asyncio.create_task(watch_room(place, lowest))
    try:
        await place.node.driver.unpack_image(fingerprint, case.layout, file, privileged, lambda stage, percent: None)
    except VzfleetError as error:
        return told(error)
    finally:
        watcher.cancel()
        assert time.monotonic() - begun < LONGEST
        assert lowest[0] > 100 * MIB, "the pool is not filled"
    return ""


async def live(place: Place, fingerprint: str) -> str:
    """Make a container, start it, stop it, remove it; what the start said."""
    driver, said = place.node.driver, ""
    try:
        await driver.create(place.node.spec("101"), fingerprint)
        try:
            await driver.start("101")
        except VzfleetError as error:
            said = told(error)
    except VzfleetError as error:
        said = told(error)
    finally:
        await driver.stop("101", 5, True) if said == "" else None
        await driver.delete("101", True)
    return said


def told(error: VzfleetError) -> str:
    """An error as a user reads it; it is one line that can be printed, of a kind that has a meaning."""
    assert error.text.isprintable() and len(error.text) < 1200
    assert error.code in ("invalid", "too-large", "no-space", "driver-failed", "conflict"), error.code
    return f"{error.code}: {error.text}"


def expected(said: str, pattern: str) -> bool:
    return re.match(pattern, said, re.DOTALL) is not None if pattern else said == ""


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
@pytest.mark.parametrize("place", ["btrfs"], indirect=True)
async def test_a_hostile_archive_harms_nothing(place: Place, case: Hostile, tmp_path: Path) -> None:
    content = case.build(str(place.outside).lstrip("/"))
    file, fingerprint = tmp_path / "image", fingerprint_of(content)
    file.write_bytes(content)
    host, held = place.host(), place.held()
    refused = ""
    try:
        assert (await inspect(file, timeout=LONGEST)).layout == case.layout
    except VzfleetError as error:
        refused = told(error)
    said = await unpack(place, case, file, fingerprint)
    lived = await live(place, fingerprint) if not said else ""
    await place.node.driver.drop_image(fingerprint)
    print(f"CASE {case.name!r}: controller {refused!r}, node {said!r}, container {lived!r}")
    assert place.host() == host
    assert place.held() == held
    assert expected(refused, case.refused), refused
    assert expected(said, case.fails), said


@pytest.mark.parametrize("case", ON_DIRECTORIES, ids=lambda case: case.name)
@pytest.mark.parametrize("place", ["dir"], indirect=True)
async def test_and_so_it_is_in_plain_directories(place: Place, case: Hostile, tmp_path: Path) -> None:
    content = case.build(str(place.outside).lstrip("/"))
    file, fingerprint = tmp_path / "image", fingerprint_of(content)
    file.write_bytes(content)
    host, held = place.host(), place.held()
    said = await unpack(place, case, file, fingerprint)
    lived = await live(place, fingerprint) if not said else ""
    await place.node.driver.drop_image(fingerprint)
    print(f"CASE {case.name!r}: node {said!r}, container {lived!r}")
    assert place.host() == host
    assert place.held() == held
    assert expected(said, case.fails), said


@pytest.mark.parametrize("case", AS_PRIVILEGED, ids=lambda case: case.name)
@pytest.mark.parametrize("place", ["btrfs"], indirect=True)
async def test_nor_as_an_image_for_privileged_containers(place: Place, case: Hostile, tmp_path: Path) -> None:
    """Their ids are the host's, their unpacking has no power over it all the same."""
    content = case.build(str(place.outside).lstrip("/"))
    file, fingerprint = tmp_path / "image", fingerprint_of(content)
    file.write_bytes(content)
    host, held = place.host(), place.held()
    said = await unpack(place, case, file, fingerprint, privileged=True)
    nodes = [path for path in place.pool.glob(f"images/{fingerprint}*/rootfs/**/*") if is_device(path)]
    await place.node.driver.drop_image(fingerprint)
    assert place.host() == host
    assert place.held() == held
    assert nodes == []
    assert said == "" or case.fails, said


def is_device(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def run_as_nobody(program: Path) -> None:
    subprocess.run([str(program)], user=65534, group=65534, extra_groups=[], check=False, timeout=10)


@pytest.mark.parametrize("place", ["btrfs", "dir"], indirect=True)
async def test_a_user_of_the_host_gets_at_no_setuid_program(place: Place) -> None:
    """It would give him the ids of all containers; of a privileged one, root's."""
    archive = with_files(busybox_archive(), {"bin/setuid": (0o4755, b"#!/bin/sh\nid -u\n")})
    driver, fingerprint = place.node.driver, await place.node.have_image(archive=archive)
    await driver.create(place.node.spec("101"), fingerprint)
    await driver.start("101")
    try:
        assert place.node.attach("101", "/bin/setuid").stdout == "0\n", "it is there, and works in the container"
        for program in place.pool.glob("*/*/rootfs/bin/setuid"):
            assert program.stat().st_mode & stat.S_ISUID
            with pytest.raises(PermissionError):
                run_as_nobody(program)
    finally:
        await driver.delete("101", True)
        await driver.drop_image(fingerprint)


async def test_what_unpacks_has_little_memory(tmp_path: Path) -> None:
    pipes = {"stdout": asyncio.subprocess.PIPE}
    async with archive.sandboxed(None, tmp_path, "ro", MIB, ("sh", "-c", "ulimit -v"), **pipes) as process:
        told, _ = await process.communicate()
    assert int(told) * 1024 == MEMORY
