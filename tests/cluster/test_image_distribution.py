"""One image file for many nodes: fetched once by each, read once from the disk, resumed, only while it is needed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from controller.api import internal
from controller.records import Image
from controller.store import images as image_rows
from tests.helpers.api import effects, scripted
from tests.helpers.cluster import Cluster, cluster, until

NODES = 10
SIZE = 24 * 2**20
LARGE = 192 * 2**20
LONGEST_DELAY = 0.25
"""Seconds for which the loop may be held while ten nodes fetch, on a machine that does other things too."""


async def add_image(fleet: Cluster, size: int) -> str:
    """An image of random bytes, which the fake driver takes for whole; its fingerprint."""
    content = secrets.token_bytes(2**20) * (size // 2**20)
    fingerprint = hashlib.sha256(content).hexdigest()
    (fleet.settings.state / "images" / fingerprint).write_bytes(content)
    image = Image(fingerprint, "rootfs", size, {}, (), "", "x.tar", "2026-01-01T00:00:00.000000Z")
    await fleet.app.store.write(lambda transaction: image_rows.rows.insert(transaction, image))
    return fingerprint


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """How many requests for image files began, by the offset that they asked for."""
    seen: Counter[int] = Counter()
    read = internal.ImageFile._start

    def start(handler: internal.ImageFile, size: int) -> int:
        offset = read(handler, size)
        seen[offset] += 1
        return offset

    with monkeypatch.context() as patch:
        patch.setattr(internal.ImageFile, "_start", start)
        yield seen


@asynccontextmanager
async def watched_loop() -> AsyncIterator[list[float]]:
    """How late a timer of 2 ms comes, in seconds."""
    late: list[float] = []

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.002
            await asyncio.sleep(0.002)
            late.append(loop.time() - due)

    task = asyncio.create_task(watch())
    try:
        yield late
    finally:
        task.cancel()


async def test_ten_nodes_at_once_fetch_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path, nodes=NODES) as fleet:
        fingerprint = await add_image(fleet, SIZE)
        source = {"type": "image", "fingerprint": fingerprint}
        with counted(monkeypatch) as seen:
            await asyncio.gather(
                *(
                    fleet.done("POST", f"/1.0/vz/{number}", {"source": source, "node": f"node{number % NODES + 1}"})
                    for number in range(2 * NODES)
                )
            )
        assert seen == {0: NODES}, "two creates on a node share one fetch"
        for node in (f"node{number}" for number in range(1, NODES + 1)):
            assert effects(fleet, fingerprint, node) == ["image.ensure"]
            assert list((tmp_path / node / "images").iterdir()) == []


@asynccontextmanager
async def creating(fleet: Cluster, fingerprint: str) -> AsyncIterator[str]:
    """A create from an image that is under way until the end of the block; its token for the file."""
    with scripted(fleet, "node1", delays={"container.create": 300.0}):
        body = {"source": {"type": "image", "fingerprint": fingerprint}, "node": "node1"}
        url = (await fleet.call("POST", "/1.0/vz/slow", body, 202))["operation"]
        yield fleet.app.engine._resources.images.ticket(fingerprint, url.rpartition("/")[2])
        await fleet.call("DELETE", url)
        await fleet.call("GET", f"{url}/wait?timeout=30")


async def fetch(fleet: Cluster, fingerprint: str, ticket: str) -> tuple[str, int]:
    """Fetch a file as a node does, in a process of its own: the status, and how many bytes came."""
    url = f"https://127.0.0.1:{fleet.settings.port}/1.0/internal/images/{fingerprint}"
    ca, header = str(fleet.settings.state / "tls" / "ca.crt"), f"Authorization: Bearer {ticket}"
    told = ("--write-out", "%{http_code} %{size_download}", "--output", "/dev/null")
    command = ("curl", "--silent", "--cacert", ca, "--header", header, *told, url)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    status, size = (await process.communicate())[0].decode().split()
    return status, int(size)


def forget_pages(file: Path) -> None:
    """Have the kernel read a file from the disk at the next time."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk() -> int:
    """Bytes that this process made the kernel read from disks (proc(5), io)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


async def test_ten_readers_read_the_disk_once_and_leave_the_loop_free(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=1) as fleet:
        fingerprint = await add_image(fleet, LARGE)
        async with creating(fleet, fingerprint) as ticket:
            forget_pages(fleet.settings.state / "images" / fingerprint)
            before, begun = read_from_disk(), time.monotonic()
            async with watched_loop() as late:
                answers = await asyncio.gather(*(fetch(fleet, fingerprint, ticket) for _ in range(NODES)))
            took, read = time.monotonic() - begun, read_from_disk() - before
        late.sort()
        rate, p99 = NODES * LARGE / took / 1e6, late[len(late) * 99 // 100]
        figures = (
            f"{rate:.0f} MB/s, read {read / LARGE:.2f} times, loop late p99 {p99 * 1e3:.1f} max {late[-1] * 1e3:.1f} ms"
        )
        print(figures)
        assert answers == [("200", LARGE)] * NODES
        assert read <= 1.1 * LARGE, figures
        assert late[-1] < LONGEST_DELAY and p99 < LONGEST_DELAY / 5, figures


async def test_a_token_is_good_as_long_as_its_operation(tmp_path: Path) -> None:
    async with cluster(tmp_path, nodes=1) as fleet:
        fingerprint = await add_image(fleet, 2**20)
        async with creating(fleet, fingerprint) as ticket:
            assert await fetch(fleet, fingerprint, ticket) == ("200", 2**20)
        headers = {"Authorization": f"Bearer {ticket}"}
        answer = await fleet.refused("GET", f"/1.0/internal/images/{fingerprint}", None, 403, headers=headers)
        assert "ended" in answer["error"]


async def test_a_fetch_goes_on_after_the_controllers_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = internal._read

    async def slowly(path: Path, start: int) -> AsyncIterator[bytes]:
        async for chunk in read(path, start):
            yield chunk
            await asyncio.sleep(0.02)

    async with cluster(tmp_path, nodes=1) as fleet:
        fingerprint = await add_image(fleet, SIZE)
        part = tmp_path / "node1" / "images" / f"{fingerprint}.part"
        with counted(monkeypatch) as seen, monkeypatch.context() as patch:
            patch.setattr(internal, "_read", slowly)
            body = {"source": {"type": "image", "fingerprint": fingerprint}}
            url = (await fleet.call("POST", "/1.0/vz/101", body, 202))["operation"]
            await until(lambda: part.exists() and part.stat().st_size > SIZE // 8, "a part of the file")
            await fleet.stop_controller()
            await fleet.start_controller()
            ended = (await fleet.call("GET", f"{url}/wait?timeout=30"))["metadata"]
        assert ended["status"] == "Success", ended
        assert sorted(seen)[0] == 0 and sorted(seen)[1] > SIZE // 8, "the rest only"
        assert effects(fleet, fingerprint, "node1") == ["image.ensure"]
