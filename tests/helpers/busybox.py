"""A tiny image for tests: the recipe of the controller's own `os: busybox`."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from functools import cache
from pathlib import Path

from controller.images.busybox import make_archive

PROGRAM = Path("/usr/bin/busybox")


@cache
def busybox_archive() -> bytes:
    """A tar archive of a root file system with busybox alone."""
    listing = subprocess.run([str(PROGRAM), "--list-full"], check=True, capture_output=True, text=True, timeout=10)
    return make_archive(PROGRAM.read_bytes(), listing.stdout.split())


def fingerprint_of(archive: bytes) -> str:
    """The image's name: the sha256 of its file."""
    return hashlib.sha256(archive).hexdigest()


def with_files(archive: bytes, files: dict[str, tuple[int, bytes]]) -> bytes:
    """The archive with more files: path to mode and content."""
    output = io.BytesIO(archive)
    with tarfile.open(fileobj=output, mode="a") as tar:
        for name, (mode, content) in files.items():
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size = mode, len(content)
            tar.addfile(entry, io.BytesIO(content))
    return output.getvalue()
