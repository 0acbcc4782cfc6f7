"""Files of other servers: fetched over HTTPS, resumed, bounded, verified; every refusal says why."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import DeadlinePassed, InvalidRequest, NoSpace, NotFound, TooLarge, Unavailable, VzfleetError
from controller.images.download import Downloads
from controller.images.files import ImageFiles
from controller.images.https import HttpsClient, check_url, make_context
from tests.helpers.https_server import Handler, https_server
from tests.helpers.streams import Streams, server_authority, sha256, streams_server, url_of

CONTENT = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(40_000))


@pytest.fixture
def streams(tmp_path: Path) -> Iterator[Streams]:
    def prepare(streams: Streams) -> None:
        streams.files["file"] = CONTENT

    with streams_server(tmp_path, prepare) as made:
        yield made


class Fetcher:
    """Fetches into a directory of its own."""

    def __init__(self, directory: Path, stall: float = 5.0, total_time: float = 30.0, attempts: int = 4) -> None:
        self.files = ImageFiles(directory / "images")
        self.reported: list[tuple[int, int | None]] = []
        client = HttpsClient(make_context(directory / "image-ca.pem"), stall=stall)
        self.downloads = Downloads(client, attempts=attempts, total_time=total_time, pause=lambda _attempt: 0.01)

    async def fetch(
        self, url: str, *, limit: int = 10**7, size: int | None = None, expected: str | None = None, head: bytes = b""
    ) -> bytes:
        """The bytes that came, after those of `head`; nothing is left behind."""
        staged = self.files.stage(limit)
        try:
            await staged.write(head)
            await self.downloads.fetch(
                url, staged, lambda *far: self.reported.append(far), limit=limit, size=size, sha256=expected
            )
            fingerprint, length = await staged.finish()
            content = staged.path.read_bytes()
            assert (fingerprint, length) == (sha256(content), len(content))
            return content
        finally:
            staged.discard()
            assert list((self.files.path("0" * 64).parent / "incoming").iterdir()) == []


async def test_a_file_comes_whole_verified_and_tells_how_far_it_is(tmp_path: Path, streams: Streams) -> None:
    fetcher = Fetcher(tmp_path)
    assert await fetcher.fetch(f"{streams.url}/file", size=len(CONTENT), expected=sha256(CONTENT)) == CONTENT
    assert fetcher.reported[-1] == (len(CONTENT), len(CONTENT))
    assert [have for have, _ in fetcher.reported] == sorted(have for have, _ in fetcher.reported)
    assert await fetcher.fetch(f"{streams.url}/file", head=b"before it") == b"before it" + CONTENT


async def test_a_cut_is_resumed_where_it_broke_off(tmp_path: Path, streams: Streams) -> None:
    streams.cuts["file"] = 400_000
    assert await Fetcher(tmp_path).fetch(f"{streams.url}/file", head=b"x", expected=sha256(CONTENT)) == b"x" + CONTENT
    ranges = [headers.get("Range") for _, headers in streams.requests]
    assert ranges == [None, "bytes=400000-", "bytes=800000-", "bytes=1200000-"]


async def test_a_file_that_changed_meanwhile_begins_again(tmp_path: Path, streams: Streams) -> None:
    streams.cuts["file"] = 400_000
    changed = CONTENT[::-1]
    send = streams._send

    def once(handler: Handler, path: str, content: bytes, etag: str) -> None:
        send(handler, path, content, etag)
        streams.files["file"] = changed
        streams.cuts.clear()

    streams._send = once  # type: ignore[method-assign]
    assert await Fetcher(tmp_path).fetch(f"{streams.url}/file", head=b"x") == b"x" + changed


async def test_one_without_ranges_begins_again(tmp_path: Path) -> None:
    answers = iter((100_000, len(CONTENT)))

    def answer(handler: Handler) -> None:
        handler.cut(200, CONTENT[: next(answers)], len(CONTENT))

    (tmp_path / "image-ca.pem").write_text(server_authority().ca)
    with https_server(tmp_path, answer, server_authority()) as server:
        assert await Fetcher(tmp_path).fetch(f"{url_of(server)}/file") == CONTENT


async def test_it_gives_up_after_some_attempts(tmp_path: Path, streams: Streams) -> None:
    streams.cuts["file"] = 0
    with pytest.raises(Unavailable, match=r"/file cannot be fetched: .*(broke off|closed)"):
        await Fetcher(tmp_path, attempts=3).fetch(f"{streams.url}/file")
    assert streams.asked("file") == 3


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"expected": "0" * 64}, InvalidRequest, "its sha256 is"),
        ({"size": len(CONTENT) + 1}, InvalidRequest, "were expected"),
        ({"size": 10}, InvalidRequest, "were expected"),
        ({"limit": 1000}, TooLarge, "too large"),
        ({"limit": 1000, "size": 2000}, TooLarge, "too large"),
    ],
)
async def test_what_is_not_the_file_is_refused(
    tmp_path: Path, streams: Streams, options: dict[str, object], error: type[VzfleetError], text: str
) -> None:
    with pytest.raises(error, match=text):
        await Fetcher(tmp_path).fetch(f"{streams.url}/file", **options)  # type: ignore[arg-type]
    assert streams.asked("file") <= 1


async def test_more_than_was_promised_is_cut_off(tmp_path: Path) -> None:
    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:
            handler.close_connection = True

    (tmp_path / "image-ca.pem").write_text(server_authority().ca)
    with https_server(tmp_path, endless, server_authority()) as server:
        fetcher = Fetcher(tmp_path)
        with pytest.raises(TooLarge):
            await fetcher.fetch(f"{url_of(server)}/file", limit=10**6)
        with pytest.raises(TooLarge):
            await fetcher.downloads.document(f"{url_of(server)}/file", limit=10**6)


async def test_redirects_lead_to_https_only_and_end(tmp_path: Path, streams: Streams) -> None:
    streams.redirects = {"a": "/b", "b": f"{streams.url}/file", "loop": "/loop", "plain": "http://localhost/file"}
    streams.redirects |= {"file-url": "file:///etc/passwd", "user": "https://me:secret@localhost/file"}
    fetcher = Fetcher(tmp_path)
    assert await fetcher.fetch(f"{streams.url}/a") == CONTENT
    for path, text in (("loop", "more than 5 times"), ("plain", "only https"), ("file-url", "only"), ("user", "only")):
        with pytest.raises(Unavailable, match=text):
            await fetcher.fetch(f"{streams.url}/{path}")
    assert streams.asked("loop") == 6


async def test_errors_say_what_is_wrong(tmp_path: Path, streams: Streams) -> None:
    fetcher = Fetcher(tmp_path, attempts=2)
    with pytest.raises(NotFound, match="localhost has no /none"):
        await fetcher.fetch(f"{streams.url}/none")
    with pytest.raises(Unavailable, match=r"the name nowhere\.invalid cannot be resolved"):
        await fetcher.fetch("https://nowhere.invalid/file")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="refused"):
            await fetcher.fetch(f"https://localhost:{probe.getsockname()[1]}/file")
    streams.down = True
    with pytest.raises(Unavailable, match="answered 503"):
        await fetcher.fetch(f"{streams.url}/file")
    strangers = Downloads(HttpsClient(make_context(None)), pause=lambda _attempt: 0.01)
    with pytest.raises(Unavailable, match="certificate of localhost is not trusted"):
        await strangers.document(f"{streams.url}/file")
    with pytest.raises(Unavailable, match=r"certificate of 127\.0\.0\.1 is not trusted"):
        await fetcher.fetch(streams.url.replace("localhost", "127.0.0.1"))


async def test_a_server_that_falls_silent_is_left(tmp_path: Path, streams: Streams) -> None:
    streams.held["file"] = threading.Event()
    with pytest.raises(Unavailable, match=r"sent nothing for 0\.2 s"):
        await Fetcher(tmp_path, stall=0.2, attempts=2).fetch(f"{streams.url}/file")
    with pytest.raises(DeadlinePassed, match=r"within 0\.3 s"):
        await Fetcher(tmp_path, total_time=0.3).fetch(f"{streams.url}/file")


async def test_a_cancel_leaves_nothing(tmp_path: Path, streams: Streams) -> None:
    streams.held["file"] = threading.Event()
    fetching = asyncio.create_task(Fetcher(tmp_path).fetch(f"{streams.url}/file"))
    await asyncio.to_thread(streams.answering.wait, 10)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching


async def test_a_full_disk_is_told_as_such(tmp_path: Path, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("controller.images.files.os.write", full)
    with pytest.raises(NoSpace):
        await Fetcher(tmp_path).fetch(f"{streams.url}/file")


async def test_a_document_is_had_again_only_when_it_changed(tmp_path: Path, streams: Streams) -> None:
    downloads = Fetcher(tmp_path).downloads
    first = await downloads.document(f"{streams.url}/file")
    assert first.content == CONTENT and first.etag
    assert (await downloads.document(f"{streams.url}/file", first.etag)).content is None
    streams.files["file"] = b"new"
    assert (await downloads.document(f"{streams.url}/file", first.etag)).content == b"new"


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/x",
        "https://",
        "https:///x",
        "ftp://localhost/x",
        "https://user@localhost/x",
        "https://user:secret@localhost/x",
        "https://localhost/x#y",
        "https://localhost\\@evil/x",
        "https://localhost/a b",
        "https://localhost/\r\nHost: evil",
        "https://localhost:99999/x",
        "https://localhost:0/x",
        "https://[::1/x",
        "https://ünicode/x",
        "https://localhost/" + "x" * 3000,
        "",
    ],
)
def test_urls_that_are_not_fetched(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_url(url)
    assert refused.value.field == "source.url"


def test_an_unusable_ca_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for path in (tmp_path / "ca.pem", tmp_path / "none.pem"):
        with pytest.raises(InvalidRequest) as refused:
            make_context(path)
        assert refused.value.field == "image_ca"
