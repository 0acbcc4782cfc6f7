"""Frames of events: RFC 6455's lengths, LXD's event object, kinds that nobody knows any more."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from controller.api.frames import Frames, text_frame
from controller.records import Event
from controller.store.telling import derive
from controller.subscriptions import Resync
from tests.helpers.core import Core
from tests.unit.test_telling import OPERATION, THEN, of_operation, op


def payload(frame: bytes) -> Any:
    """What an unmasked text frame carries."""
    assert frame[0] == 0x81
    size, start = frame[1], 2
    if size == 126:
        size, start = struct.unpack("!H", frame[2:4])[0], 4
    elif size == 127:
        size, start = struct.unpack("!Q", frame[2:10])[0], 10
    assert len(frame) == start + size
    return json.loads(frame[start:])


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_lengths(size: int) -> None:
    text = "x" * max(0, size - 2)
    assert payload(text_frame(json.dumps(text).encode())) == text


@pytest.fixture
def frames(tmp_path: Path) -> Frames:
    core = Core(tmp_path)
    return Frames(core.fleet, core.operations)


def numbered(event: Event) -> Event:
    return replace(event, sequence=7, at=THEN)


def test_an_operation_is_lxds_object(frames: Frames) -> None:
    (event,) = derive([of_operation(OPERATION, new=True)])
    frame = payload(frames.event(numbered(event)))
    assert frame.keys() == {"type", "timestamp", "location", "project", "metadata", "sequence"}
    assert (frame["type"], frame["timestamp"], frame["location"], frame["sequence"]) == ("operation", THEN, "n1", 7)
    assert (frame["metadata"]["id"], frame["metadata"]["status_code"]) == ("op", 103)
    assert frame["metadata"]["description"] == "Starting container"


def test_a_kind_that_nobody_knows_any_more_can_be_told(frames: Frames) -> None:
    (event,) = derive([of_operation(op("container.forgotten"))])
    view = payload(frames.event(numbered(event)))["metadata"]
    assert (view["description"], view["may_cancel"]) == ("container.forgotten", False)


def test_a_resync_says_from_where_on_all_is_known(frames: Frames) -> None:
    frame = payload(frames.resync(Resync(3, 99)))
    assert (frame["type"], frame["sequence"], frame["metadata"]["since"]) == ("resync", 99, 3)


def test_there_are_no_figures_of_what_is_not_there(frames: Frames) -> None:
    assert frames.metric("gone") == b""
