"""What a node shows by its mode, what runs twice, and what a drain plans."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from common.clock import ManualClock
from common.errors import Busy
from common.messages import Outcome, Result, StateChanged
from common.reports import ContainerReport
from common.states import NodeStatus, Status
from controller.fleet import Fleet
from controller.live import LiveNode, shown_status
from controller.operations.kinds import Evacuation
from controller.operations.nodes import TRIES, Account, one
from controller.records import Container, Node, NodeMode, Operation, Phase
from controller.services.fencing import Fencing
from controller.services.requests import NodeStateBody
from controller.store import containers as container_rows
from tests.helpers.cluster import until
from tests.helpers.core import CALLER, make_template, open_core
from tests.helpers.recording_listener import RecordingListener

AT = "2026-01-01T00:00:00.000000Z"
NODE = Node("n1", "k", AT)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


def live(status: NodeStatus, mode: NodeMode, fenced: bool = False, returning: str = "") -> LiveNode:
    by = {"fenced_at": AT, "fenced_by": "anna"} if fenced else {}
    record = msgspec.structs.replace(NODE, mode=mode, **by)
    return LiveNode(record, status, "silent" if status is not NodeStatus.ONLINE else "", returning=returning)


@pytest.mark.parametrize(
    ("node", "reachable", "shown", "message"),
    [
        (live(NodeStatus.ONLINE, NodeMode.ACTIVE), True, "Online", ""),
        (live(NodeStatus.SUSPECT, NodeMode.ACTIVE), True, "Suspect", "silent"),
        (live(NodeStatus.OFFLINE, NodeMode.ACTIVE), False, "Offline", "silent"),
        (live(NodeStatus.ONLINE, NodeMode.DRAINING), True, "Draining", "0 are on it"),
        (live(NodeStatus.OFFLINE, NodeMode.DRAINING), False, "Offline", "silent"),
        (live(NodeStatus.OFFLINE, NodeMode.FENCED, True), False, "Offline", f"fenced by anna at {AT}"),
        # The link may hear of it before the store does: an operator's word counts.
        (live(NodeStatus.ONLINE, NodeMode.FENCED, True), False, "Offline", "fenced by anna"),
        (live(NodeStatus.OFFLINE, NodeMode.DRAINING, True, "stops c1"), False, "Offline", "stops c1"),
        (live(NodeStatus.ONLINE, NodeMode.DRAINING, True), True, "Draining", "back after it was fenced by anna"),
    ],
)
def test_status_and_message(node: LiveNode, reachable: bool, shown: str, message: str) -> None:
    assert (node.reachable, str(node.shown)) == (reachable, shown)
    assert message in node.message if message else node.message == ""


def row(node: str, generation: int, operation: str | None = None) -> Container:
    return Container("c", node, generation, "c", "", {}, None, "00:16:3e:00:00:01", AT, Phase.READY, operation)


def test_a_container_of_a_fenced_node_says_by_whom() -> None:
    fleet = Fleet(ManualClock())
    fleet.load(
        [msgspec.structs.replace(NODE, mode=NodeMode.FENCED, fenced_at=AT, fenced_by="anna")], [row("n1", 1)], [], []
    )
    shown = shown_status(fleet.containers["c"], fleet.nodes["n1"])
    assert shown.status is Status.ERROR and "fenced by anna" in (shown.reason or "")


@pytest.mark.parametrize(
    ("owner", "generation", "status", "stopped_by"),
    [
        (row("n2", 5), 4, Status.RUNNING, 5),
        (row("n2", 5), 4, Status.FROZEN, 5),
        (row("n2", 5), 4, Status.STOPPED, None),
        # Left by a move to here that was undone without this node.
        (row("n2", 5), 6, Status.RUNNING, 6),
        # The target of a move that is under way, and its source after the switch.
        (row("n2", 5, "move"), 6, Status.RUNNING, None),
        (row("n2", 5, "move"), 4, Status.RUNNING, 5),
        (row("n1", 5), 5, Status.RUNNING, None),
        (row("n1", 5), 4, Status.RUNNING, None),
        # Made by hand, and of nobody.
        (row("n2", 5), 0, Status.RUNNING, None),
        (None, 4, Status.RUNNING, None),
    ],
)
def test_what_runs_elsewhere_is_to_be_stopped(
    owner: Container | None, generation: int, status: Status, stopped_by: int | None
) -> None:
    fleet = Fleet(ManualClock())
    fleet.load([NODE, msgspec.structs.replace(NODE, name="n2")], [owner] if owner else [], [], [])
    if owner is not None:
        fleet.nodes["n2"].images = {}
        fleet.containers["c"].report = ContainerReport("c", owner.generation, int(Status.STOPPED))
    fencing = Fencing(cast(Any, None), cast(Any, None), fleet, ManualClock())
    report = ContainerReport("c", generation, int(status))
    assert fencing._strays("n1", [report]) == ([(report, stopped_by)] if stopped_by is not None else [])


@pytest.mark.parametrize("told", [False, True])
def test_what_its_own_node_has_not_is_let_be_where_it_runs(told: bool) -> None:
    fleet = Fleet(ManualClock())
    fleet.load([NODE, msgspec.structs.replace(NODE, name="n2")], [row("n2", 5)], [], [])
    fleet.nodes["n2"].images = {} if told else None
    fencing = Fencing(cast(Any, None), cast(Any, None), fleet, ManualClock())
    moved = ContainerReport("c", 6, int(Status.RUNNING))
    older = ContainerReport("c", 4, int(Status.RUNNING))
    assert fencing._strays("n1", [moved]) == []
    assert fencing._strays("n1", [older]) == [(older, 5)]


async def test_a_stray_that_is_told_of_again_and_again_is_stopped_one_stop_at_a_time() -> None:
    fleet = Fleet(ManualClock())
    fleet.load([NODE, msgspec.structs.replace(NODE, name="n2")], [row("n2", 5)], [], [])
    fencing = Fencing(RecordingListener(), cast(Any, None), fleet, ManualClock())
    stops: list[asyncio.Future[Result]] = []

    class Dispatch:
        async def call(self, *_arguments: Any, **_named: Any) -> Result:
            stops.append(asyncio.get_running_loop().create_future())
            return await stops[-1]

        def acknowledge(self, *_arguments: Any) -> None:
            pass

    fencing.dispatcher = cast(Any, Dispatch())
    for _ in range(100):
        fencing.state_changed("n1", StateChanged(ContainerReport("c", 4, int(Status.RUNNING))))
        await asyncio.sleep(0)
    for ended in range(2):
        await until(lambda ended=ended: len(stops) == ended + 1, "a stop")
        stops[ended].set_result(Result("stop", outcome=Outcome()))
    await until(lambda: not fencing._stopping, "the end of the stops")
    assert len(stops) == 2, "what was told during the first one may be a start after it"
    await fencing.close()


async def test_a_plan_counts_what_it_has_placed_already(tmp_path: Path, template: Path) -> None:
    core = await open_core(template, tmp_path / "core")
    try:
        size = 4 * 10**9

        def grow(transaction: Any) -> None:
            for id in ("c", "d", "z"):
                record = container_rows.require(transaction, id)
                config = {"limits.memory": "4GB"}
                grown = msgspec.structs.replace(record, config=config, reserved_memory=size)
                container_rows.rows.replace(transaction, grown)

        await core.store.write(grow)
        plan = cast(list[dict[str, Any]], await core.drains.drain(CALLER, "n1", NodeStateBody("drain", preview=True)))
        # The other node has 8 GB.
        assert [(task["container"], task["action"]) for task in plan] == [("c", "move"), ("d", "move"), ("z", "leave")]
        assert "memory" in plan[2]["reason"]
        assert core.fleet.nodes["n1"].record.mode is NodeMode.ACTIVE
    finally:
        await core.close()


class BusyForEver:
    """An evacuation whose containers are always busy with another operation."""

    def __init__(self) -> None:
        self.waited: list[str] = []
        self.left = ["c"]

    async def begin(self, operation: Operation, container: str) -> Operation:
        raise Busy("c is busy", details={"operation": "/1.0/operations/other"})

    async def ended(self, operation: str) -> Operation:
        self.waited.append(operation)
        return cast(Operation, None)

    async def waiting(self, operation: Operation) -> list[str]:
        return self.left


async def test_what_is_busy_again_and_again_is_left() -> None:
    evacuation, account = BusyForEver(), Account()
    await one(cast(Evacuation, evacuation), cast(Operation, None), "c", account)
    assert account.left == [{"container": "c", "reason": "c is busy"}] and account.seen == {"c"}
    assert evacuation.waited == ["other"] * (TRIES - 1)


async def test_what_the_other_operation_has_done_meanwhile_is_neither_left_nor_failed() -> None:
    evacuation, account = BusyForEver(), Account()
    evacuation.left = []
    await one(cast(Evacuation, evacuation), cast(Operation, None), "c", account)
    assert evacuation.waited == ["other"] and account == Account()
