"""Joining: good tokens, damaged ones, and controllers which are not the one."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import AgentConfig, load
from agent.enrolment import CLOCK_ERROR, join, read_token
from common import keys
from common.clock import ManualClock
from common.errors import Conflict, DeadlinePassed, Forbidden, InvalidRequest, Unauthorized, Unavailable
from tests.helpers.https_server import Answer, Authority, Handler, authority, https_server, make_authority

CLOCK = ManualClock()
CONTROLLER = keys.generate()


def token(address: str, /, **changed: object) -> str:
    der = ssl.PEM_cert_to_DER_cert(authority().ca)
    fields: dict[str, object] = {
        "v": 1,
        "api": address,
        "link": "tcp://127.0.0.1:8444",
        "ca": hashlib.sha256(der).hexdigest(),
        "key": CONTROLLER.public,
        "node": "node1",
        "secret": "s3cret",
        "expires": (CLOCK.now() + timedelta(hours=1)).isoformat(),
    }
    return base64.urlsafe_b64encode(json.dumps({**fields, **changed}).encode()).decode().rstrip("=")


def controller(asked: list[dict[str, object]], by: Authority | None = None, status: int = 201) -> Answer:
    """A controller which gives its CA to anyone and enrols whoever asks (or says `status`)."""

    def answer(handler: Handler) -> None:
        if handler.path == "/1.0/ca":
            handler.reply(200, (by or authority()).ca.encode())
            return
        body = json.loads(handler.body())
        asked.append(body)
        if status != 201:
            told = {"type": "error", "error": "the token was used", "metadata": {"code": "unauthorized"}}
            handler.reply(status, json.dumps(told).encode())
            return
        handler.reply(200, json.dumps({"type": "sync", "metadata": {"node": body["node"] or "node7"}}).encode())

    return answer


def config(tmp_path: Path, node: str = "") -> AgentConfig:
    return AgentConfig(state=tmp_path / "state", node=node, driver="fake", pool=Path("/pool"), autostart_delay=None)


async def test_a_host_joins_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []
    with https_server(tmp_path, controller(asked)) as server:
        text = token(server.api)
        joined = await join(text, config(tmp_path), CLOCK)
        state = tmp_path / "state"
        assert load(state / "agent.json") == joined
        assert (joined.node, joined.api, joined.controller) == ("node1", server.api, "tcp://127.0.0.1:8444")
        assert (joined.driver, joined.pool, joined.autostart_delay) == ("fake", Path("/pool"), None)
        assert asked == [
            {"secret": "s3cret", "node": "node1", "public_key": keys.load(state / "agent.key").public},
        ]
        assert (state / "controller.pub").read_text().strip() == CONTROLLER.public
        assert (state / "ca.crt").read_text().strip() == authority().ca.strip()
        assert state.stat().st_mode & 0o777 == 0o711
        assert all(file.stat().st_mode & 0o077 == 0 for file in state.iterdir())
        before = {file.name: file.read_bytes() for file in state.iterdir()}
        assert await join(text, config(tmp_path), CLOCK) == joined
        assert {file.name: file.read_bytes() for file in state.iterdir()} == before
        assert len(asked) == 1


async def test_the_controller_may_name_the_node(tmp_path: Path) -> None:
    with https_server(tmp_path, controller([])) as server:
        assert (await join(token(server.api, node=None), config(tmp_path), CLOCK)).node == "node7"


async def test_the_host_may_name_the_node(tmp_path: Path) -> None:
    with https_server(tmp_path, controller([])) as server:
        assert (await join(token(server.api, node=None), config(tmp_path, "mine"), CLOCK)).node == "mine"


async def test_names_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Conflict):
        await join(token("https://127.0.0.1:1"), config(tmp_path, "other"), CLOCK)


async def test_a_host_of_another_controller_is_left_alone(tmp_path: Path) -> None:
    with https_server(tmp_path, controller([])) as server:
        await join(token(server.api), config(tmp_path), CLOCK)
        with pytest.raises(Conflict, match="purge"):
            await join(token(server.api, key=keys.generate().public), config(tmp_path), CLOCK)
        with pytest.raises(Conflict, match="purge"):
            await join(token(server.api, node="node2"), config(tmp_path), CLOCK)


async def test_a_used_token_is_told_in_the_controllers_words(tmp_path: Path) -> None:
    with https_server(tmp_path, controller([], status=401)) as server:
        with pytest.raises(Unauthorized, match="the token was used"):
            await join(token(server.api), config(tmp_path), CLOCK)
        assert not (tmp_path / "state" / "agent.json").exists()


async def test_an_expired_token_is_not_even_tried(tmp_path: Path) -> None:
    expired = (CLOCK.now() - CLOCK_ERROR).isoformat()
    with pytest.raises(DeadlinePassed, match="expired"):
        await join(token("https://127.0.0.1:1", expires=expired), config(tmp_path), CLOCK)
    assert not (tmp_path / "state").exists()


async def test_an_unreachable_controller_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await join(token("https://127.0.0.1:1"), config(tmp_path), CLOCK)


async def test_another_ca_than_the_tokens_is_refused_before_the_secret_is_told(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []
    other = make_authority()
    refused = pytest.raises(Forbidden, match="not the controller")
    with https_server(tmp_path, controller(asked, by=other), other) as server, refused:
        await join(token(server.api), config(tmp_path), CLOCK)
    # The right CA is public: a server which shows it, but is not certified by it, learns no secret either.
    mistrusted = pytest.raises(Unavailable, match="certificate")
    with https_server(tmp_path, controller(asked), other) as server, mistrusted:
        await join(token(server.api), config(tmp_path), CLOCK)
    assert asked == []


@pytest.mark.parametrize(
    "body", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----"]
)
async def test_what_is_no_certificate_is_refused(tmp_path: Path, body: bytes) -> None:
    with https_server(tmp_path, lambda handler: handler.reply(200, body)) as server, pytest.raises(Forbidden):
        await join(token(server.api), config(tmp_path), CLOCK)


@pytest.mark.parametrize(
    "changed",
    [
        {"v": 2},
        {"api": "http://127.0.0.1"},
        {"api": "https://"},
        {"api": "https://a\nb:1"},
        {"link": "ipc:///tmp/x"},
        {"link": "tcp://a:b"},
        {"ca": "0f"},
        {"key": "short"},
        {"secret": ""},
        {"secret": 5},
        {"node": "../x"},
        {"expires": "tomorrow"},
        {"expires": "2026-01-01T00:00:00"},
    ],
)
def test_damaged_tokens_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        read_token(token("https://127.0.0.1:1", **changed))


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: base64.urlsafe_b64encode(data).decode()))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        read_token(text)


def test_a_token_survives_being_wrapped_over_lines() -> None:
    text = token("https://[::1]:8443")
    wrapped = "\n".join(text[start : start + 60] for start in range(0, len(text), 60))
    assert read_token(f" {wrapped}\n") == read_token(text)
    assert read_token(text).expires.astimezone(UTC) > datetime(2026, 1, 1, tzinfo=UTC)
