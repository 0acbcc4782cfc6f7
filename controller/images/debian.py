"""The image `os: debian`: a minimal Debian with systemd, made by mmdebstrap from Debian's packages."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tarfile
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from common import process
from common.errors import DeadlinePassed, DriverFailed
from controller.images.builder import (
    Builder,
    BuiltImage,
    ReportProgress,
    check_known,
    debian_architecture,
    host_architecture,
)
from controller.images.debian_recipe import make_command, make_overlay, recipe_hash, suite
from controller.images.files import ImageFiles, StagedImage

SIZE_LIMIT = 4 * 1024**3
TIMEOUT = 1800.0
"""Seconds for a whole build; slow mirrors and emulated machines included."""
_CHUNK = 256 * 1024
_LONGEST_LINE = 1024 * 1024

STAGES = {
    "running apt-get update": ("fetching package lists", 5),
    "downloading packages": ("downloading packages", 15),
    "extracting archives": ("extracting packages", 40),
    "installing essential": ("installing essential packages", 50),
    "installing remaining": ("installing packages", 65),
    "cleaning package lists": ("cleaning up", 85),
    "creating tarball": ("packing", 90),
}

DEFAULT_ARCHIVES = ("http://deb.debian.org/debian", "http://deb.debian.org/debian-security")
_URI = re.compile(r"(https?|file|copy):[!-~]+")


class DebianBuilder(Builder):
    """Builds `os: debian` with mmdebstrap, from the archive that this host's apt uses, else from deb.debian.org."""

    os = "debian"

    def __init__(self, archives: tuple[str, str] | None = None, timeout: float = TIMEOUT) -> None:
        """`archives` are the addresses of Debian's archive and of its security archive; None: this host's."""
        self._archives = archives
        self._timeout = timeout

    def check(self, properties: Mapping[str, str]) -> None:
        """Refuse unknown properties, releases and other architectures."""
        check_known(properties)
        suite(properties)

    def key(self, properties: Mapping[str, str]) -> str:
        """The same for all names of a release; changes with the recipe, not with the archive's packages."""
        return f"debian/{suite(properties)}/{debian_architecture(host_architecture())}/{recipe_hash()}"

    async def build(self, properties: Mapping[str, str], files: ImageFiles, report: ReportProgress) -> BuiltImage:
        """Make the image in about a minute. Raises DriverFailed without mmdebstrap or the archive, DeadlinePassed."""
        self.check(properties)
        if shutil.which("mmdebstrap") is None:
            raise DriverFailed("mmdebstrap is not installed on the controller: apt-get install mmdebstrap")
        release = suite(properties)
        scratch = files.scratch()
        try:
            overlay = scratch / "overlay.tar"
            await asyncio.to_thread(overlay.write_bytes, make_overlay())
            command = make_command(release, overlay, self._archives or await host_archives())
            staged = files.stage(SIZE_LIMIT)
            try:
                await _run(command, scratch, staged, report, self._timeout)
                await staged.finish()
            except BaseException:
                staged.discard()
                raise
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True))
        report("packing", 100)
        described = {"description": f"Debian {release} ({host_architecture()})", "os": self.os, "release": release}
        return BuiltImage(staged, "rootfs", described | {"architecture": host_architecture()})


async def host_archives() -> tuple[str, str]:
    """Debian's archives as this host's apt knows them (apt-get(8) indextargets), else Debian's own."""
    found = []
    for label, default in zip(("Debian", "Debian-Security"), DEFAULT_ARCHIVES, strict=True):
        filters = ("Created-By: Packages", "Origin: Debian", f"Label: {label}")
        done = await process.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)", *filters], timeout=30, check=False
        )
        uris = [line for line in done.output.split("\n") if _URI.fullmatch(line)]
        found.append(uris[0].rstrip("/") if uris else default)
    return found[0], found[1]


async def _run(command: list[str], scratch: Path, staged: StagedImage, report: ReportProgress, timeout: float) -> None:
    """Run mmdebstrap to its end, its output compressed into `staged`; however this ends, no process is left."""
    mmdebstrap = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=_LONGEST_LINE,
        env={**os.environ, "LC_ALL": "C.UTF-8", "TMPDIR": str(scratch)},
    )
    assert mmdebstrap.stdout is not None and mmdebstrap.stderr is not None  # noqa: S101 - both are pipes
    messages = asyncio.create_task(_follow(mmdebstrap.stderr, report))
    try:
        async with asyncio.timeout(timeout):
            await _compress(mmdebstrap.stdout, staged)
            code, last = await mmdebstrap.wait(), await messages
    except TimeoutError:
        raise DeadlinePassed(f"mmdebstrap did not end within {timeout:g} s") from None
    finally:
        messages.cancel()
        await process.end(mmdebstrap)
    if code != 0:
        raise DriverFailed(f"mmdebstrap ended with code {code}: {'; '.join(last)[:600] or 'it printed nothing'}")


async def _compress(source: asyncio.StreamReader, staged: StagedImage) -> None:
    """Write mmdebstrap's tar, with an empty /dev before it, into `staged` as gzip (RFC 1952), the fastest level."""
    packer = zlib.compressobj(level=1, wbits=31)
    await staged.write(packer.compress(_empty_dev()))
    while chunk := await source.read(_CHUNK):
        await staged.write(await asyncio.to_thread(packer.compress, chunk))
    await staged.write(packer.flush())


def _empty_dev() -> bytes:
    """The archive's entry for /dev, which mmdebstrap leaves out with the devices: LXC mounts its own over it."""
    entry = tarfile.TarInfo("./dev/")
    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    return entry.tobuf(tarfile.USTAR_FORMAT)


async def _follow(messages: asyncio.StreamReader, report: ReportProgress) -> list[str]:
    """Report the stages that mmdebstrap prints, to its end; gives its last errors, or its last lines."""
    last: deque[str] = deque(maxlen=3)
    errors: deque[str] = deque(maxlen=3)
    while raw := await messages.readline():
        line = raw.decode(errors="replace").strip()
        if not line:
            continue
        last.append(line)
        if line.startswith("E:"):
            errors.append(line)
        for marker, (stage, percent) in STAGES.items():
            if line.startswith(f"I: {marker}"):
                report(stage, percent)
    return list(errors or last)
