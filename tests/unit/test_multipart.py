"""Bodies in parts: the same parts however the bytes come, bounded, refused when they are none."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from controller.api.multipart import MAX_PART_HEAD, Multipart, Part, boundary_of

BOUNDARY = b"b0undary"


def body(parts: list[tuple[str, bytes]], preamble: bytes = b"", epilogue: bytes = b"") -> bytes:
    """As clients send it."""
    pieces = [preamble]
    for name, content in parts:
        head = f'Content-Disposition: form-data; name="{name}"; filename="{name}.tar"\r\nX-Other: y'.encode()
        pieces.append(b"--" + BOUNDARY + b"\r\n" + head + b"\r\n\r\n" + content + b"\r\n")
    return b"".join((*pieces, b"--", BOUNDARY, b"--\r\n", epilogue))


def parsed(pieces: list[bytes]) -> tuple[list[tuple[str, bytes]], bool]:
    """The parts, each with all of its bytes, and whether the end has come."""
    reader, parts = Multipart(BOUNDARY), list[tuple[str, bytearray]]()
    for piece in pieces:
        for event in reader.feed(piece):
            if isinstance(event, Part):
                assert event.filename == f"{event.name}.tar"
                parts.append((event.name, bytearray()))
            else:
                parts[-1][1].extend(event)
    return [(name, bytes(content)) for name, content in parts], reader.complete


CONTENT = st.binary(max_size=80) | st.lists(
    st.sampled_from([b"\r\n", b"--", b"-", BOUNDARY, b"\r\n--", b"\r\n--b0un", b"\r", b"\n", b"x"]), max_size=12
).map(b"".join)


@settings(max_examples=400)
@given(
    st.lists(CONTENT.filter(lambda content: b"\r\n--" + BOUNDARY not in b"\r\n" + content), max_size=3),
    st.lists(st.integers(0, 500), max_size=12),
    st.sampled_from([b"", b"to be ignored\r\n"]),
    st.sampled_from([b"", b"so is this"]),
)
def test_the_parts_are_the_same_however_the_bytes_come(
    contents: list[bytes], cuts: list[int], preamble: bytes, epilogue: bytes
) -> None:
    parts = [(f"p{number}", content) for number, content in enumerate(contents)]
    sent = body(parts, preamble, epilogue)
    places = sorted({0, len(sent), *(cut for cut in cuts if cut < len(sent))})
    assert parsed([sent[start:end] for start, end in pairwise(places)]) == (parts, True)


def test_byte_by_byte() -> None:
    parts = [("metadata", b"\r\n-- almost \r\n--b0undar"), ("rootfs", b"")]
    sent = body(parts)
    assert parsed([sent[at : at + 1] for at in range(len(sent))]) == (parts, True)


def test_a_body_that_ends_early_is_not_complete() -> None:
    sent = body([("metadata", b"x" * 100)])
    for end in range(len(sent) - 3):
        assert parsed([sent[:end]])[1] is False


@pytest.mark.parametrize(
    "sent",
    [
        b"--b0undaryx\r\n",
        b"--b0undary" + b" " * 200 + b"\r\n",
        b"--b0undary\r\n\r\n",
        b"--b0undary\r\nContent-Disposition: attachment; name=x\r\n\r\n",
        b"--b0undary\r\nContent-Disposition: form-data\r\n\r\n",
        b"--b0undary\r\n" + b"X" * (MAX_PART_HEAD + 1),
        b"--b0undary\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
    ],
)
def test_what_is_no_part_is_refused(sent: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parsed([sent])


def test_memory_is_bounded_whatever_comes() -> None:
    reader = Multipart(BOUNDARY)
    list(reader.feed(body([("metadata", b"")])[: -len(b"\r\n--b0undary--\r\n")] + b"\r\n"))
    for _ in range(100):
        list(reader.feed(b"\r\n--b0undar" * 1000))
        assert len(reader._buffer) < 100


@pytest.mark.parametrize("text", ["multipart/form-data", "multipart/form-data; boundary=", "x; boundary=" + "y" * 71])
def test_a_boundary_is_needed(text: str) -> None:
    with pytest.raises(InvalidRequest):
        boundary_of(text)


def test_the_boundary_may_be_quoted() -> None:
    assert boundary_of('multipart/form-data; boundary="a b=c"; charset=utf-8') == b"a b=c"
