"""Which results of commands nothing asks for any more, so that the node may forget them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from common.clock import ManualClock
from common.failpoints import never
from common.states import Status
from controller.operations.execution import Execution
from controller.operations.moves import MOVE
from controller.records import Operation, Requestor

STANDING = Operation(
    id="op",
    kind=MOVE.name,
    status=Status.RUNNING,
    created_at="2026-01-01T00:00:00.000000Z",
    updated_at="2026-01-01T00:00:00.000000Z",
    deadline_at="2026-01-01T01:00:00.000000Z",
    containers=("c",),
    node="node2",
    requestor=Requestor("admin", "tls", "127.0.0.1"),
    request="r",
    parameters={},
    resources={},
)

STOP = [step.name for step in MOVE.steps].index("stop")


def execution(**stands: Any) -> Execution:
    """A move that stands somewhere; nothing of it is run."""
    nothing, resources = cast(Any, None), cast(Any, SimpleNamespace(clock=ManualClock()))
    return Execution(msgspec.structs.replace(STANDING, **stands), MOVE, resources, nothing, nothing, never, nothing)


@pytest.mark.parametrize(
    ("command", "position", "undoing", "past"),
    [
        ("op/stop/do", STOP + 1, False, True),
        ("op/stop/do-force", STOP + 1, False, True),
        ("op/rest/do-send", STOP + 1, False, False),
        ("op/start/do", STOP + 1, False, False),
        ("op/stop/undo", STOP + 1, False, False),
        ("op/start/do", STOP + 2, True, True),
        ("op/rest/undo", STOP + 1, True, False),
        ("op/rest/undo", STOP, True, True),
        ("op/stop/undo", STOP, True, False),
        ("op/stop/undo", STOP - 1, True, True),
        ("op/unknown/do", STOP + 4, False, False),
        ("op", STOP + 4, False, False),
        ("", STOP + 4, True, False),
        ("op/stop", 0, False, False),
    ],
)
def test_a_result_is_past_when_its_step_is_recorded(command: str, position: int, undoing: bool, past: bool) -> None:
    assert execution(position=position, undoing=undoing).is_past(command) is past
