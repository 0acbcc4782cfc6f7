"""What of a btrfs stream may reach `btrfs receive`: all that an honest one holds, and nothing else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from agent.drivers.lxc.ids import IdMap
from agent.drivers.lxc.transfers.guard import Guard
from common.errors import InvalidRequest
from tests.helpers import btrfs_streams as streams

IDS = IdMap(streams.FIRST, 65536)


def pass_on(stream: bytes, guard: Guard, piece: int = 1 << 20) -> bytes:
    passed = b"".join(guard.feed(memoryview(stream)[at : at + piece]) for at in range(0, len(stream), piece))
    guard.finish()
    return passed


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_an_honest_stream_passes_as_it_is(piece: int) -> None:
    for stream in (streams.HONEST, *streams.PAST_THE_GUARD.values()):
        assert pass_on(stream, Guard(streams.STREAM, IDS), piece) == stream


@pytest.mark.parametrize("name", streams.HOSTILE)
def test_a_hostile_one_is_refused(name: str) -> None:
    for piece in (3, 1 << 20):
        with pytest.raises(InvalidRequest) as refused:
            pass_on(streams.HOSTILE[name], Guard(streams.STREAM, IDS), piece)
        assert len(refused.value.text) < 500
        assert refused.value.text.isprintable()


def test_a_difference_has_the_parent_that_was_said() -> None:
    body = streams.cloned(streams.PARENT) + streams.cloned(streams.OWN)
    guard = Guard(streams.STREAM, IDS, streams.PARENT, frozenset((streams.PARENT,)))
    assert pass_on(streams.stream(body, made=streams.snapshot()), guard)
    for parent, made in ((streams.PARENT, streams.subvolume()), (streams.FOREIGN, streams.snapshot())):
        with pytest.raises(InvalidRequest):
            pass_on(streams.stream(made=made), Guard(streams.STREAM, IDS, parent, frozenset((parent,))))


def test_one_of_a_privileged_container_may_have_any_owner_but_no_device() -> None:
    allowed = ("the host's root", "a user of the host", "a capability on the host", "an attribute of root's")
    for name in allowed:
        assert pass_on(streams.HOSTILE[name], Guard(streams.STREAM, None))
    for name in ("a disk", "two dots", "no id", "a foreign clone"):
        with pytest.raises(InvalidRequest):
            pass_on(streams.HOSTILE[name], Guard(streams.STREAM, None))


def test_a_device_node_is_named_as_it_would_be_found() -> None:
    node = streams.on(streams.MKNOD, b"o9-9-9", (streams.INO, 9), (streams.RDEV, 0x700), (streams.MODE, 0o060600))
    renamed = streams.on(streams.RENAME, b"o9-9-9", (streams.PATH_TO, b"rootfs/dev/loop0"))
    before = streams.opening() + streams.subvolume() + streams.root()
    guard = Guard(streams.STREAM, IDS)
    assert guard.feed(before + node) == before, "the node itself does not pass"
    with pytest.raises(InvalidRequest, match=r"device node.*: dev/loop0"):
        guard.feed(renamed)


@settings(max_examples=400, deadline=None)
@given(some.data())
def test_whatever_is_changed_in_it_only_our_errors_come(data: some.DataObject) -> None:
    stream = bytearray(data.draw(some.sampled_from([streams.HONEST, *streams.HOSTILE.values()])))
    for _ in range(data.draw(some.integers(1, 5))):
        if not stream:
            break
        at = data.draw(some.integers(0, len(stream) - 1))
        change = data.draw(some.sampled_from(("set", "cut", "insert", "drop")))
        if change == "set":
            stream[at] = data.draw(some.integers(0, 255))
        elif change == "cut":
            del stream[at:]
        elif change == "insert":
            stream[at:at] = data.draw(some.binary(max_size=20))
        else:
            del stream[at : at + data.draw(some.integers(1, 20))]
    with contextlib.suppress(InvalidRequest):
        assert pass_on(bytes(stream), Guard(streams.STREAM, IDS), 64) == bytes(stream)
