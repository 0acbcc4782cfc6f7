"""Answers to ZAP requests: only a known key by CURVE in our own domain is let in, and every request is answered."""

from __future__ import annotations

import pytest

from common import zap

KEY = b"k" * 32
GOOD = [b"1.0", b"7", zap.DOMAIN, b"127.0.0.1", b"", b"CURVE", KEY]


def status(request: list[bytes]) -> bytes:
    reply = zap.answer(request, {KEY: "agent"}.get)
    assert len(reply) == 6
    return reply[2]


def test_a_known_key_is_let_in_under_its_user_id() -> None:
    assert zap.answer(GOOD, {KEY: "agent"}.get) == [b"1.0", b"7", b"200", b"OK", b"agent", b""]


@pytest.mark.parametrize(
    "request_frames",
    [
        [*GOOD[:6], b"x" * 32],
        [*GOOD[:6], b""],
        [*GOOD[:5], b"NULL"],
        [*GOOD[:5], b"PLAIN", b"agent", b"password"],
        [*GOOD[:5], b"NULL", KEY],
        [*GOOD[:2], b"other", *GOOD[3:]],
        [*GOOD[:2], b"", *GOOD[3:]],
        [b"2.0", *GOOD[1:]],
        [*GOOD, b"more"],
        [b"1.0"],
        [],
    ],
)
def test_anything_else_is_refused(request_frames: list[bytes]) -> None:
    assert status(request_frames) == b"400"
