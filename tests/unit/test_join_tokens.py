"""The join token's text: there and back, and nothing else is taken for one."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.keys import generate
from controller.join_tokens import JoinToken, decode, encode, hash_secret, new_secret

TOKEN = JoinToken(
    api="https://10.0.0.1:8443",
    link="tcp://[fd00::1]:8444",
    ca="0f" * 32,
    key="Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID",
    node="node1",
    secret="A" * 43,
    expires=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)


def plain(**changes: object) -> str:
    fields = json.loads(base64.urlsafe_b64decode(encode(TOKEN) + "=="))
    return base64.urlsafe_b64encode(json.dumps(fields | changes).encode()).decode().rstrip("=")


def test_the_text_is_one_word_with_the_agreed_fields() -> None:
    text = encode(TOKEN)
    assert text.replace("-", "").replace("_", "").isalnum()
    assert json.loads(base64.urlsafe_b64decode(text + "==")) == {
        "v": 1,
        "api": "https://10.0.0.1:8443",
        "link": "tcp://[fd00::1]:8444",
        "ca": "0f" * 32,
        "key": TOKEN.key,
        "node": "node1",
        "secret": "A" * 43,
        "expires": "2026-01-02T03:04:05.000000Z",
    }


@given(
    node=st.none() | st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"),
    expires=st.datetimes(timezones=st.just(UTC)),
)
@hypothesis_settings(max_examples=50, deadline=None, database=None)
def test_there_and_back(node: str | None, expires: datetime) -> None:
    expires = expires.replace(year=max(expires.year, 1000))
    token = JoinToken(TOKEN.api, TOKEN.link, TOKEN.ca, generate().public, node, new_secret(), expires)
    assert decode(f"  {encode(token)}\n") == token


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not a token",
        "====",
        "é" * 8,
        "A" * 5000,
        base64.urlsafe_b64encode(b"[]").decode(),
        plain(v=2),
        plain(v=None),
        plain(more=1),
        plain(api="http://10.0.0.1:8443"),
        plain(api="https://host:1\nX"),
        plain(link="ipc:///tmp/x"),
        plain(ca="0F" * 32),
        plain(key="short"),
        plain(node="Node 1"),
        plain(node="node1\n"),
        plain(secret="x"),
        plain(expires="tomorrow"),
        plain(expires="2026-01-02T03:04:05"),
    ],
)
def test_anything_else_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(text)
    assert caught.value.__cause__ is None and "A" * 10 not in str(caught.value)


def test_secrets_are_fresh_and_stored_as_hashes_only() -> None:
    secret = new_secret()
    assert len(secret) == 43 and secret != new_secret()
    assert len(hash_secret(secret)) == 64 and secret not in hash_secret(secret)
    assert TOKEN.secret not in repr(TOKEN)
