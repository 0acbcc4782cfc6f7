"""/1.0/events through what breaks it: restarts, a pruned log, readers that do not read, a controller that stops."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from controller import events as bus
from controller.api.events import Events as Handler
from controller.store import events as rows
from tests.helpers.api import make
from tests.helpers.cluster import Cluster, cluster, until
from tests.helpers.listener import connect, ended, listening

UPGRADE = (
    "GET /1.0/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path) as made:
        yield made


class SilentClient:
    """A websocket of a client that reads nothing of what it is sent, and answers nothing, until it is told to."""

    def __init__(self, fleet: Cluster) -> None:
        plain = socket.create_connection(("127.0.0.1", fleet.settings.port), timeout=20)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        context = ssl.create_default_context(cafile=str(fleet.settings.state / "tls" / "ca.crt"))
        self.socket = context.wrap_socket(plain, server_hostname="127.0.0.1")
        self.socket.sendall(UPGRADE.format(token=fleet.token).encode())
        assert b" 101 " in self.socket.recv(4096)

    def rest(self) -> bytes:
        """All that it was sent."""
        found = b""
        while piece := self.socket.recv(2**16):
            found += piece
        return found


@asynccontextmanager
async def silent(fleet: Cluster) -> AsyncIterator[SilentClient]:
    client = await asyncio.to_thread(SilentClient, fleet)
    try:
        yield client
    finally:
        client.socket.close()


def tell(fleet: Cluster, count: int, size: int = 10) -> None:
    for number in range(count):
        fleet.app.events.note("test", f"/test/{number}", details={"text": "x" * size})


async def latest(fleet: Cluster) -> int:
    return await fleet.app.store.read(rows.latest)


async def test_a_restart_in_between_loses_nothing(fleet: Cluster) -> None:
    listener = await connect(fleet)
    await make(fleet)
    await listener.next()
    seen = listener.sequences[-1]
    await fleet.stop_controller()
    await listener.to_end()
    assert listener.connection.close_code == 1001
    reason = listener.connection.close_reason or ""
    assert reason.startswith("the controller stops; resume with since=")
    last = listener.sequences[-1]
    assert reason.endswith(f"since={last}")
    await fleet.start_controller()
    await fleet.wait_for_node("node1", "Online")
    operation = await fleet.done("DELETE", f"/1.0/vz/{await make(fleet)}")
    for since in (seen, last):
        async with listening(fleet, f"?since={since}") as resumed:
            await resumed.until(ended(operation["id"]))
        assert resumed.sequences == list(range(since + 1, since + 1 + len(resumed.frames)))
        assert not any(frame["type"] == "resync" for frame in resumed.frames)


async def test_what_was_pruned_is_said(tmp_path: Path) -> None:
    async with cluster(tmp_path, event_history=20) as fleet:
        tell(fleet, 100)
        await until(lambda: fleet.app.events.latest >= 100, "all told")
        while await fleet.app._prune_batch():
            pass
        last = await latest(fleet)
        async with listening(fleet, "?since=1") as listener:
            frame = await listener.next()
            assert frame is not None and (frame["type"], frame["sequence"]) == ("resync", last)
            assert frame["metadata"]["since"] == 1 and "anew" in frame["metadata"]["reason"]
            tell(fleet, 1)
            following = await listener.next()
            assert following is not None and following["sequence"] == last + 1
        async with listening(fleet, f"?since={last - 19}") as listener:
            await listener.until(lambda frame: frame.get("sequence") == last + 1)
            assert listener.sequences == list(range(last - 18, last + 2))


async def test_who_does_not_read_is_dropped_and_loses_nothing(fleet: Cluster) -> None:
    first = fleet.app.events.latest
    async with silent(fleet) as client:
        (subscription,) = fleet.app.events.subscriptions
        while not subscription.ended:
            tell(fleet, 100, size=10_000)
            await until(lambda: not len(fleet.app.events.notes), "written")
            assert fleet.app.events.latest < 10_000, "it is never dropped"
        # What it had not taken is behind the number that it is told, once it reads again.
        since, last = subscription.position, fleet.app.events.latest
        assert first < since < last - 1000
        given = await asyncio.to_thread(client.rest)
    assert given.endswith(f"too slow; resume with since={since}".encode())
    assert f'"sequence":{since}}}'.encode() in given and f'"sequence":{since + 1}}}'.encode() not in given
    await until(lambda: not fleet.app.events.subscriptions, "it is gone")
    assert fleet.app.events.kept == 0, "nothing is kept when nobody listens"
    async with listening(fleet, f"?since={since}") as resumed:
        await resumed.until(lambda frame: frame.get("sequence") == last)
    assert resumed.sequences == list(range(since + 1, last + 1))


async def test_who_does_not_answer_is_dropped(fleet: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "ping_interval", 0.2)
    monkeypatch.setattr(Handler, "ping_timeout", 0.2)
    async with silent(fleet), listening(fleet) as listener:
        assert len(fleet.app.events.subscriptions) == 2
        await until(lambda: len(fleet.app.events.subscriptions) == 1, "the silent one is gone", 15)
        tell(fleet, 1)
        assert await listener.next() is not None, "who answers stays"


async def test_a_stop_waits_for_nobody_who_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "LEAVE_TIME", 0.3)
    async with cluster(tmp_path) as fleet, silent(fleet):
        async with asyncio.timeout(10):
            await fleet.stop_controller()
        await fleet.start_controller()


async def test_a_node_that_goes_and_comes_is_told(tmp_path: Path) -> None:
    async with cluster(tmp_path, heartbeat_timeout=1.0) as fleet, listening(fleet, "?type=lifecycle") as listener:
        await fleet.stop_agent("node1")
        offline = await listener.until(lambda frame: frame["metadata"]["action"] == "node-offline")
        assert offline["location"] == "node1" and offline["metadata"]["context"]["reason"]
        await fleet.start_agent("node1")
        await listener.until(lambda frame: frame["metadata"]["action"] == "node-online")


async def test_lost_commits_are_a_resync(tmp_path: Path) -> None:
    """An older database put in place: its numbers are not given again to other events."""
    async with cluster(tmp_path) as fleet:
        await fleet.stop_controller()
        file = fleet.settings.state / "controller.db"
        older = file.read_bytes()
        await fleet.start_controller()
        tell(fleet, 10)
        await until(lambda: fleet.app.events.latest > 10, "told")
        lost = await latest(fleet)
        await fleet.stop_controller()
        file.write_bytes(older)
        for beside in ("-wal", "-shm"):
            file.with_name(file.name + beside).unlink(missing_ok=True)
        await fleet.start_controller()
        for since in (lost, lost - 3):
            async with listening(fleet, f"?since={since}") as listener:
                frame = await listener.next()
                assert frame is not None and frame["type"] == "resync" and frame["sequence"] > rows.LEAP
