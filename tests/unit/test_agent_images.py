"""Fetching images: whole or cut, right or wrong, once or many at a time."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.https import HttpsClient, pinned_context
from agent.images import CHUNK
from common.commands import EnsureImage
from common.errors import Unavailable
from common.messages import Result
from common.reports import ImageSpec
from tests.helpers.agent_parts import agent_parts
from tests.helpers.https_server import Handler, authority, https_server, make_authority

DATA = bytes(range(256)) * 4096 * 4
FINGERPRINT = hashlib.sha256(DATA).hexdigest()
IMAGE = ImageSpec(FINGERPRINT, "rootfs", len(DATA), "/1.0/images/x/export", "token-of-this-operation")


def error_of(result: Result) -> str:
    assert result.error is not None
    return result.error.code


async def test_an_image_is_fetched_verified_and_unpacked_once(tmp_path: Path) -> None:
    with https_server(tmp_path, lambda handler: handler.reply(200, DATA)) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            results = [await parts.do(f"op/{n}/do", EnsureImage(IMAGE)) for n in range(2)]
            assert [result.outcome and result.outcome.bytes for result in results] == [len(DATA), 0]
            assert len(server.requests) == 1
            method, path, headers = server.requests[0]
            assert (method, path) == ("GET", "/1.0/images/x/export")
            assert headers["Authorization"] == "Bearer token-of-this-operation"
            assert [line.split()[0] for line in parts.effects()] == ["image.ensure"]
            assert list((tmp_path / "images").iterdir()) == [], "the file is removed"


async def test_the_same_image_is_fetched_once_at_a_time(tmp_path: Path) -> None:
    with https_server(tmp_path, lambda handler: handler.reply(200, DATA)) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            for number in range(5):
                parts.executor.receive(parts.command(f"op/{number}/do", EnsureImage(IMAGE)))
            results = await asyncio.gather(*(parts.result(f"op/{number}/do") for number in range(5)))
            assert all(result.error is None for result in results)
            assert len(server.requests) == 1


async def test_a_cut_fetch_is_resumed_where_it_stopped(tmp_path: Path) -> None:
    half = len(DATA) // 2

    def answer(handler: Handler) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if wanted is None:
            handler.cut(200, DATA[:half], len(DATA))
            return
        start = int(wanted[1])
        handler.reply(206, DATA[start:], content_range=f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")

    with https_server(tmp_path, answer) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            result = await parts.do("op/1/do", EnsureImage(IMAGE))
            assert result.error is None
            ranges = [headers.get("Range") for _, _, headers in server.requests]
            assert ranges[0] is None
            start = int(ranges[1].removeprefix("bytes=").removesuffix("-")) if ranges[1] else 0
            assert 0 < start <= half
            assert len(ranges) == 2


@pytest.mark.parametrize("seed", range(12))
async def test_a_fetch_that_is_cut_anywhere_and_often_comes_whole(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    edges = [0, 1, CHUNK - 1, CHUNK, len(DATA) - 1]
    cuts = sorted(chance.choice([*edges, chance.randrange(len(DATA))]) for _ in range(chance.randint(1, 14)))
    sent = 0

    def answer(handler: Handler) -> None:
        nonlocal sent
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        status, headers = (
            (206, {"content_range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"}) if wanted else (200, {})
        )
        left = [cut for cut in cuts if cut >= start]
        if not left:
            sent += len(DATA) - start
            handler.reply(status, DATA[start:], **headers)
            return
        cuts.remove(left[0])
        sent += left[0] - start
        handler.cut(status, DATA[start : left[0]], len(DATA) - start, **headers)

    with https_server(tmp_path, answer) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            result = await parts.do("op/1/do", EnsureImage(IMAGE))
            assert (result.error, result.outcome and result.outcome.bytes) == (None, len(DATA))
            assert sent == len(DATA), "no byte came twice"
            assert [line.split()[0] for line in parts.effects()] == ["image.ensure"]


async def test_a_damaged_image_is_fetched_anew(tmp_path: Path) -> None:
    damaged = DATA[:70_000] + bytes([DATA[70_000] ^ 1]) + DATA[70_001:]
    answers = [damaged, DATA]
    with https_server(tmp_path, lambda handler: handler.reply(200, answers.pop(0))) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            result = await parts.do("op/1/do", EnsureImage(IMAGE))
            assert (result.error, result.outcome and result.outcome.bytes) == (None, 2 * len(DATA))
            assert answers == [] and len(parts.effects()) == 1


async def test_an_image_that_comes_damaged_twice_is_given_up(tmp_path: Path) -> None:
    with https_server(tmp_path, lambda handler: handler.reply(200, DATA[:-1] + b"x")) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            assert error_of(await parts.do("op/1/do", EnsureImage(IMAGE))) == "driver-failed"
            assert len(server.requests) == 2
            assert list((tmp_path / "images").iterdir()) == [] and parts.effects() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The directory of images is a disk of half an image's size."""
    images = tmp_path / "images"
    images.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={len(DATA) // 2}", "vz-test", str(images)]
    subprocess.run(mount, check=True, timeout=10)
    yield images
    subprocess.run(["umount", str(images)], check=True, timeout=10)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root")
@pytest.mark.parametrize("foreseen", [True, False])
async def test_a_full_disk_is_told_and_left_empty(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    """Whether the room is too small from the beginning, or goes while the image comes."""
    if not foreseen:
        monkeypatch.setattr("agent.images._check_room", lambda *_: None)
    (small_disk / f"{FINGERPRINT}.part").write_bytes(DATA[:1000])
    span = f"bytes 1000-{len(DATA) - 1}/{len(DATA)}"
    with https_server(tmp_path, lambda handler: handler.reply(206, DATA[1000:], content_range=span)) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            assert error_of(await parts.do("op/1/do", EnsureImage(IMAGE))) == "no-space"
            assert len(server.requests) == (0 if foreseen else 1)
            assert list(small_disk.iterdir()) == [] and parts.effects() == []


@pytest.mark.parametrize("status", [200, 416])
async def test_a_server_without_ranges_sends_it_all_again(tmp_path: Path, status: int) -> None:
    calls = 0

    def answer(handler: Handler) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            handler.cut(200, DATA[:1000], len(DATA))
        elif calls == 2 and status == 416:
            handler.reply(416)
        else:
            handler.reply(200, DATA)

    with https_server(tmp_path, answer) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            assert (await parts.do("op/1/do", EnsureImage(IMAGE))).error is None


async def test_what_an_earlier_run_fetched_is_used(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{FINGERPRINT}.part").write_bytes(DATA)

    def answer(handler: Handler) -> None:
        raise AssertionError("nothing is missing")

    with https_server(tmp_path, answer) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            result = await parts.do("op/1/do", EnsureImage(IMAGE))
            assert (result.error, result.outcome and result.outcome.bytes) == (None, 0)


@pytest.mark.parametrize("wrong", [DATA[:-1] + b"x", b"more" + DATA, DATA[:-10]])
async def test_a_wrong_image_is_never_unpacked(tmp_path: Path, wrong: bytes) -> None:
    with https_server(tmp_path, lambda handler: handler.reply(200, wrong)) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            assert error_of(await parts.do("op/1/do", EnsureImage(IMAGE))) in ("driver-failed", "unavailable")
            assert parts.effects() == []


async def test_a_range_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{FINGERPRINT}.part").write_bytes(DATA[:1000])
    span = f"bytes 500-{len(DATA) - 1}/{len(DATA)}"
    with https_server(tmp_path, lambda handler: handler.reply(206, DATA[500:], content_range=span)) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            assert error_of(await parts.do("op/1/do", EnsureImage(IMAGE))) == "unavailable"


@pytest.mark.parametrize(("status", "code"), [(401, "unauthorized"), (403, "forbidden"), (404, "not-found")])
async def test_a_refusal_is_final_and_told(tmp_path: Path, status: int, code: str) -> None:
    with https_server(tmp_path, lambda handler: handler.reply(status, b'{"error": "because"}')) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            result = await parts.do("op/1/do", EnsureImage(IMAGE))
            assert error_of(result) == code
            assert result.error is not None
            assert "because" in result.error.text
            assert len(server.requests) == 1


async def test_an_image_larger_than_the_disk_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).free * 2 + 1
    image = ImageSpec(FINGERPRINT, "rootfs", min(size, 2**42), "/x", "t")
    if size > 2**42:
        pytest.skip("this disk is larger than any image")
    with https_server(tmp_path, lambda handler: handler.reply(200, DATA)) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            assert error_of(await parts.do("op/1/do", EnsureImage(image))) == "no-space"
            assert server.requests == []


async def test_an_absent_controller_is_unavailable(tmp_path: Path) -> None:
    async with agent_parts(tmp_path) as parts:
        assert error_of(await parts.do("op/1/do", EnsureImage(IMAGE))) == "unavailable"


async def test_a_cancelled_fetch_lets_go_at_once(tmp_path: Path) -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def answer(handler: Handler) -> None:
        handler.cut(200, b"", len(DATA))
        loop.call_soon_threadsafe(asked.set)
        handler.rfile.read(1)

    with https_server(tmp_path, answer) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            parts.executor.receive(parts.command("op/1/do", EnsureImage(IMAGE)))
            await asyncio.wait_for(asked.wait(), 10)
            began = loop.time()
            await parts.executor.close()
            assert loop.time() - began < 1


async def test_only_the_pinned_controller_is_trusted(tmp_path: Path) -> None:
    wrong_name = make_authority("somebody-else")
    cases = [(make_authority(), authority().ca), (wrong_name, wrong_name.ca)]
    for by, trusted in cases:
        with https_server(tmp_path, lambda handler: handler.reply(200, b"secret"), by) as server:
            client = HttpsClient(server.api, pinned_context(trusted))
            with pytest.raises(Unavailable, match="certificate"):
                await client.fetch("GET", "/")
            client.close()
            assert server.requests == []
    with https_server(tmp_path, lambda handler: handler.reply(200, b"hello")) as server:
        client = HttpsClient(server.api, pinned_context(authority().ca))
        assert await client.fetch("GET", "/") == b"hello"
        client.close()
