"""What happens by itself is told once, and what operations do is not told a second time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from common.messages import Inventory, StateChanged
from common.reports import ContainerReport
from common.states import NodeStatus, Status
from controller.events import Events
from controller.services.happenings import Happenings
from tests.helpers.core import FACTS, Core, make_template, open_core


class Notes:
    """Keeps what was noted."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, str]] = []
        self.details: list[Mapping[str, Any]] = []

    def note(self, action: str, source: str, *, details: Mapping[str, Any], **_where: str) -> None:
        self.noted.append((action, source))
        self.details.append(details)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
async def core(template: Path, tmp_path: Path) -> AsyncIterator[Core]:
    made = await open_core(template, tmp_path)
    yield made
    await made.close()


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def listener(core: Core, notes: Notes) -> Happenings:
    return Happenings(core.nodes, core.fleet, cast(Events, notes))


def report(core: Core, id: str, status: int) -> ContainerReport:
    return replace(core.there.report("n1", id), status=status)


def changed(core: Core, id: str, status: int, removed: bool = False) -> StateChanged:
    return StateChanged(report(core, id, status), removed)


@pytest.mark.parametrize(
    ("id", "status", "action"),
    [
        ("c", Status.STOPPED, "container-stopped"),
        ("c", Status.FROZEN, "container-paused"),
        ("c", Status.ERROR, "container-failed"),
        ("d", Status.RUNNING, "container-started"),
        ("z", Status.RUNNING, "container-resumed"),
        ("z", Status.STOPPED, "container-stopped"),
    ],
)
def test_a_container_changes(core: Core, listener: Happenings, notes: Notes, id: str, status: int, action: str) -> None:
    listener.state_changed("n1", changed(core, id, status))
    listener.state_changed("n1", changed(core, id, status))
    assert notes.noted == [(action, f"/1.0/vz/{id}")] and notes.details == [{"by": "itself"}]


def test_one_vanishes(core: Core, listener: Happenings, notes: Notes) -> None:
    listener.state_changed("n1", changed(core, "c", Status.RUNNING, removed=True))
    assert notes.noted == [("container-vanished", "/1.0/vz/c")]


@pytest.mark.parametrize("status", [Status.STOPPING, Status.STARTING, 777])
def test_what_is_under_way_or_unknown_is_not_told(core: Core, listener: Happenings, notes: Notes, status: int) -> None:
    listener.state_changed("n1", changed(core, "c", status))
    assert notes.noted == []


def test_what_an_operation_does_is_its_own_event(core: Core, listener: Happenings, notes: Notes) -> None:
    live = core.fleet.containers["c"]
    live.record = replace(live.record, operation="op")
    listener.state_changed("n1", changed(core, "c", Status.STOPPED))
    assert notes.noted == []


def test_another_node_says_nothing(core: Core, listener: Happenings, notes: Notes) -> None:
    listener.state_changed("n2", changed(core, "c", Status.STOPPED))
    assert notes.noted == []


def test_another_generation_stands_in_place_of_what_has_vanished(
    core: Core, listener: Happenings, notes: Notes
) -> None:
    other = replace(report(core, "c", Status.STOPPED), generation=99)
    listener.state_changed("n1", StateChanged(other, False))
    assert notes.noted == [("container-vanished", "/1.0/vz/c")]


async def test_what_changed_out_of_reach_is_told_when_the_node_is_back(
    core: Core, listener: Happenings, notes: Notes
) -> None:
    stopped = Inventory(FACTS, (report(core, "c", Status.STOPPED), report(core, "z", Status.FROZEN)), ())
    answer = listener.inventory("n1", stopped)
    assert not isinstance(answer, Mapping)
    await answer
    assert sorted(notes.noted) == [("container-stopped", "/1.0/vz/c"), ("container-vanished", "/1.0/vz/d")]


async def test_what_was_kept_through_a_restart_is_too_old_to_compare(
    core: Core, listener: Happenings, notes: Notes
) -> None:
    core.fleet.nodes["n1"].images = None
    answer = listener.inventory("n1", Inventory(FACTS, (report(core, "c", Status.STOPPED),), ()))
    assert not isinstance(answer, Mapping)
    await answer
    assert notes.noted == []


def test_a_node_goes_and_comes(core: Core, listener: Happenings, notes: Notes) -> None:
    listener.node_status("n1", NodeStatus.SUSPECT, "silent")
    listener.node_status("n1", NodeStatus.OFFLINE, "silent")
    listener.node_status("n1", NodeStatus.OFFLINE, "silent")
    listener.node_status("n1", NodeStatus.ONLINE, "")
    listener.node_status("n1", NodeStatus.ONLINE, "another agent holds its key")
    listener.node_status("nobody", NodeStatus.ONLINE, "")
    assert [action for action, _ in notes.noted] == [
        "node-suspect",
        "node-offline",
        "node-online",
        "node-online",
    ]
    assert notes.details[-1] == {"reason": "another agent holds its key"}
