"""Sending and receiving containers through the relay."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.commands import CreateContainer, CreateSnapshot, ReceiveContainer, SendContainer, StartContainer
from tests.helpers.agent_parts import agent_parts, spec
from tests.helpers.https_server import Handler, https_server

PATH, TOKEN = "/1.0/transfers/7", "token-of-this-transfer"


async def test_what_one_node_sends_another_receives(tmp_path: Path) -> None:
    relayed: list[bytes] = []

    def answer(handler: Handler) -> None:
        assert handler.headers["Authorization"] == f"Bearer {TOKEN}"
        if handler.command == "PUT":
            relayed.append(handler.body())
            handler.reply(200, b"{}")
        else:
            handler.reply(200, relayed[0])

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with https_server(tmp_path, answer) as server:
        async with agent_parts(tmp_path / "a", api=server.api) as parts:
            await parts.do("op/1/do", CreateContainer(spec(), None))
            await parts.do("op/2/do", CreateSnapshot("101", "s"))
            parts.driver.write("101", "x" * 500_000)
            sent = await parts.do("op/3/do", SendContainer("101", PATH, TOKEN, with_snapshots=True))
            assert sent.error is None
            assert sent.outcome is not None
            assert sent.outcome.bytes == len(relayed[0]) > 500_000
        async with agent_parts(tmp_path / "b", api=server.api) as parts:
            received = await parts.do("op/4/do", ReceiveContainer(spec(), PATH, TOKEN))
            assert received.error is None
            assert received.outcome is not None
            assert received.outcome.bytes == len(relayed[0])
            assert received.outcome.container is not None
            assert [snapshot.name for snapshot in received.outcome.container.snapshots] == ["s"]


async def test_a_stream_that_is_cut_makes_no_container(tmp_path: Path) -> None:
    def cut_chunked(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nhello\r\n")
        handler.close_connection = True

    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"hello")
        handler.close_connection = True

    answers = [cut_chunked, endless, lambda handler: handler.cut(200, b"hello", 100)]
    for number, answer in enumerate(answers):
        with https_server(tmp_path, answer) as server:
            async with agent_parts(tmp_path, api=server.api) as parts:
                result = await parts.do(f"op/{number}/do", ReceiveContainer(spec(), PATH, TOKEN))
                assert result.error is not None
                assert result.error.code == "unavailable"
                assert parts.effects() == []
                assert await parts.driver.containers() == []


@pytest.mark.parametrize("early", [False, True])
async def test_what_the_relay_says_is_told(tmp_path: Path, early: bool) -> None:
    def answer(handler: Handler) -> None:
        if not early:
            handler.body()
        body = b'{"type": "error", "error": "no such transfer", "metadata": {"code": "not-found"}}'
        handler.reply(404, body)
        if early and handler.command == "PUT":
            # A close with unread data would reset the connection and take the answer with it.
            handler.body()

    with https_server(tmp_path, answer) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            await parts.do("op/1/do", CreateContainer(spec(), None))
            sent = await parts.do("op/2/do", SendContainer("101", PATH, TOKEN))
            assert sent.error is not None
            assert sent.error.code == "not-found"
            assert "no such transfer" in sent.error.text
            received = await parts.do("op/3/do", ReceiveContainer(spec("102"), PATH, TOKEN))
            assert received.error is not None
            assert received.error.code == "not-found"


async def test_a_running_container_is_not_sent(tmp_path: Path) -> None:
    with https_server(tmp_path, lambda handler: handler.reply(200, b"")) as server:
        async with agent_parts(tmp_path, api=server.api) as parts:
            await parts.do("op/1/do", CreateContainer(spec(), None))
            await parts.do("op/2/do", StartContainer("101"))
            result = await parts.do("op/3/do", SendContainer("101", PATH, TOKEN))
            assert result.error is not None
            assert result.error.code == "conflict"
