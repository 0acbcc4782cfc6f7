"""Image files: named by what they hold, whole or absent, bounded."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.errors import Cancelled, InvalidRequest, NoSpace, TooLarge
from controller.images.files import BATCH, ImageFiles

CONTENT = b"0123456789abcdef" * 1000


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def left(files: ImageFiles, tmp_path: Path) -> list[str]:
    """What is in the directory beside whole images."""
    return sorted(path.name for path in (tmp_path / "incoming").iterdir())


def descriptors(directory: Path) -> list[str]:
    """The files below a directory that this process has open."""
    open_files = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)  # noqa: PTH115 - a deleted file's name must be kept as it is
        except FileNotFoundError:
            continue
        if target.startswith(str(directory)):
            open_files.append(target)
    return open_files


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    return ImageFiles(tmp_path)


async def test_a_received_file_is_kept_under_its_sha256(files: ImageFiles, tmp_path: Path) -> None:
    staged = await files.receive(stream(CONTENT, b"", CONTENT), limit=10**6)
    expected = hashlib.sha256(CONTENT * 2).hexdigest()
    assert (staged.fingerprint, staged.size) == (expected, 2 * len(CONTENT))
    assert files.fingerprints() == [], "not whole before it is kept"
    kept = await files.keep(staged)
    assert kept == files.path(expected)
    assert kept.read_bytes() == CONTENT * 2
    assert kept.stat().st_mode & 0o077 == 0
    assert files.fingerprints() == [expected]
    staged.discard()
    assert kept.exists(), "discard after keep does nothing"
    assert left(files, tmp_path) == [] and descriptors(tmp_path) == []


async def test_writing_piece_by_piece_gives_the_same(files: ImageFiles) -> None:
    content = os.urandom(3 * BATCH + 17)
    staged = files.stage(limit=len(content))
    for start in range(0, len(content), 70_000):
        await staged.write(content[start : start + 70_000])
    assert await staged.finish() == (hashlib.sha256(content).hexdigest(), len(content))
    assert (await files.keep(staged)).read_bytes() == content


async def test_the_same_content_twice_is_one_file(files: ImageFiles) -> None:
    first = await files.keep(await files.receive(stream(CONTENT), 10**6))
    second = await files.keep(await files.receive(stream(CONTENT), 10**6))
    assert first == second and len(files.fingerprints()) == 1


async def test_a_byte_over_the_limit_is_refused_and_leaves_nothing(files: ImageFiles, tmp_path: Path) -> None:
    exact = await files.receive(stream(CONTENT), limit=len(CONTENT))
    exact.discard()
    with pytest.raises(TooLarge, match=str(len(CONTENT) - 1)):
        await files.receive(stream(CONTENT), limit=len(CONTENT) - 1)
    assert left(files, tmp_path) == [] and descriptors(tmp_path) == []


async def test_a_stream_that_fails_leaves_nothing(files: ImageFiles, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield CONTENT
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await files.receive(broken(), 10**6)
    assert left(files, tmp_path) == [] and descriptors(tmp_path) == []


async def test_a_full_disk_is_no_space(files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    staged = files.stage(10**6)
    monkeypatch.setattr("controller.images.files.os.write", full)
    await staged.write(CONTENT)
    with pytest.raises(NoSpace):
        await staged.finish()
    assert left(files, tmp_path) == [] and descriptors(tmp_path) == []


async def test_cancelled_while_a_thread_writes(
    files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    real_write = os.write

    def slow(descriptor: int, data: memoryview) -> int:
        began.set()
        assert go_on.wait(10)
        return real_write(descriptor, data)

    staged = files.stage(10**8)
    monkeypatch.setattr("controller.images.files.os.write", slow)
    writing = asyncio.create_task(staged.write(bytes(BATCH)))
    assert await asyncio.to_thread(began.wait, 10)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert left(files, tmp_path) == []
    assert len(descriptors(tmp_path)) == 1, "the thread's descriptor must stay its own until it is done"
    go_on.set()
    async with asyncio.timeout(10):
        while descriptors(tmp_path):  # noqa: ASYNC110 - closed by a callback of the file's own
            await asyncio.sleep(0.005)
    with pytest.raises(Cancelled):
        await staged.write(b"more")


async def test_only_a_finished_file_can_be_kept(files: ImageFiles) -> None:
    staged = files.stage(10)
    with pytest.raises(ValueError, match="finished"):
        await files.keep(staged)
    staged.discard()
    staged.discard()


async def test_sweep_removes_what_a_crash_left_and_keeps_images(files: ImageFiles, tmp_path: Path) -> None:
    kept = await files.keep(await files.receive(stream(CONTENT), 10**6))
    (tmp_path / "incoming" / "image-crashed").write_bytes(b"half")
    scratch = files.scratch()
    (scratch / "deep").mkdir()
    (scratch / "deep" / "link").symlink_to(tmp_path)
    (tmp_path / "incoming" / "outside").symlink_to(tmp_path)
    files.sweep()
    assert left(files, tmp_path) == []
    assert kept.exists() and files.fingerprints() == [kept.name]


def test_sweep_and_listing_before_anything_exists(tmp_path: Path) -> None:
    files = ImageFiles(tmp_path / "absent")
    files.sweep()
    assert files.fingerprints() == []


async def test_delete_takes_fingerprints_only(files: ImageFiles, tmp_path: Path) -> None:
    kept = await files.keep(await files.receive(stream(CONTENT), 10**6))
    (tmp_path / "precious").write_text("x")
    for name in ("../precious", "precious", "", kept.name[:12], kept.name.upper(), "a" * 63 + "\n"):
        with pytest.raises(InvalidRequest):
            files.delete(name)
    files.delete(kept.name)
    files.delete(kept.name)
    assert files.fingerprints() == [] and (tmp_path / "precious").exists()
