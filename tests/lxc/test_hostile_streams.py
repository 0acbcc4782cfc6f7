"""Hostile btrfs streams, fed to the real `btrfs receive`: nothing outside the transfer's place is changed."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.drivers.base import Incoming
from agent.drivers.lxc.transfers.frames import Answer, Frames, Next, Opening, Taken, Volume
from agent.drivers.lxc.transfers.places import Place
from common.errors import InvalidRequest, VzfleetError
from tests.helpers import btrfs_streams as streams
from tests.helpers.channels import carried, channel_pair
from tests.helpers.two_nodes import OneNode, real_node, spec
from tests.lxc import conftest as machine

own_network = machine.own_network
state_directory = machine.state_directory
pytestmark = [pytest.mark.lxc, pytest.mark.timeout(180)]


@pytest.fixture
async def node(state_directory: Path, own_network: str) -> AsyncIterator[OneNode]:
    async with real_node(state_directory, own_network, 0, storage="btrfs") as made:
        yield made
    assert machine.leftovers(made.config) == []
    made.config.state.rmdir()


async def send(node: OneNode, stream: bytes, id: str) -> None:
    """Send it as a hostile node would."""
    one, other = channel_pair()

    async def hostile() -> None:
        frames = Frames(one)
        await frames.tell(Opening(2, "btrfs", 0, True, (Volume(streams.STREAM),)))
        await frames.hear(Answer)
        await frames.tell(Next(streams.STREAM))
        for at in range(0, len(stream), 1000):
            await frames.write(stream[at : at + 1000])
        await frames.end_volume()
        await frames.hear(Taken)
        await frames.finish(first=False)

    incoming = Incoming(spec(id), f"t{id}", 0, "btrfs", last=True)
    await carried(hostile(), node.driver.receive(incoming, other), one)


def outside(node: OneNode) -> list[tuple[str, int, int]]:
    """What a stream could have reached: the pool but for transfers, and some files of the host."""
    paths = [path for path in node.pool.rglob("*") if "transfers" not in path.parts]
    paths += [Path("/etc/passwd"), Path("/etc/cron.d"), Path("/usr/bin")]
    return [(str(path), path.lstat().st_mtime_ns, path.lstat().st_mode) for path in sorted(paths)]


async def test_an_honest_one_written_by_hand_is_taken(node: OneNode) -> None:
    await send(node, streams.HONEST, "1")
    root = node.rootfs("1")
    facts = (root / "file").stat()
    assert (facts.st_uid, facts.st_mode & 0o7777, facts.st_nlink) == (streams.FIRST, 0o4755, 2)
    assert (root / "file").read_bytes() == b"content"
    assert (node.pool / "transfers" / "t1").stat().st_mode & 0o7777 == 0o700
    await node.driver.end_transfer("t1")


async def test_another_volume_under_a_checked_name_is_not_taken_for_it(node: OneNode) -> None:
    storage = node.driver._parts.host.storage  # type: ignore[attr-defined]
    place = Place(storage, "t1", "data", private=True)
    await place.open()
    for name in ("round-0", "round-1"):
        await storage.commit(await storage.create(), place.inner(name))
    await place.set_whole("round-0")
    assert place.whole() == {"round-0"}
    (place.path / "round-0").rename(place.path / "away")
    (place.path / "round-1").rename(place.path / "round-0")
    assert place.whole() == set()
    await node.driver.end_transfer("t1")


async def test_whatever_is_changed_in_it_only_our_errors_come(node: OneNode) -> None:
    chance, before = random.Random(4), outside(node)
    for number in range(1, 26):
        stream = bytearray(streams.HONEST)
        for _ in range(chance.randint(1, 3)):
            stream[chance.randrange(len(stream))] = chance.randrange(256)
        with contextlib.suppress(VzfleetError):
            await send(node, bytes(stream), str(number))
        await node.driver.end_transfer(f"t{number}")
        await node.driver.delete(str(number), force=True)
    assert [entry for entry in before if entry not in outside(node) and str(node.pool) not in entry[0]] == []
    assert await node.driver.containers() == []
    assert node.kept() == []


async def test_nothing_of_it_becomes_a_container(node: OneNode) -> None:
    before = outside(node)
    cases = {**streams.HOSTILE, **streams.PAST_THE_GUARD}
    for number, (name, stream) in enumerate(cases.items()):
        with pytest.raises(VzfleetError) as refused:
            await send(node, stream, str(number + 1))
        assert isinstance(refused.value, InvalidRequest), (name, refused.value)
        kept = list((node.pool / "transfers" / f"t{number + 1}").iterdir())
        assert [path.name for path in kept] == ["data"], name
        assert list(kept[0].iterdir()) == [], name
        await node.driver.end_transfer(f"t{number + 1}")
    assert await node.driver.containers() == []
    assert [path for path in before if path not in outside(node) and "staging" not in path[0]] == []
    assert node.kept() == []
    assert not os.path.lexists("/usr/bin/evil")
