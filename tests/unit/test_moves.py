"""A move round by round: what is sent in which order, by which way, and what is left when it fails anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.commands import (
    Arguments,
    DeleteContainer,
    EndTransfer,
    ReceiveContainer,
    SendContainer,
    StartContainer,
    StopContainer,
)
from common.errors import Conflict, DeadlinePassed, DriverFailed, NoPlacement, Unreachable, Unsupported
from common.reports import ContainerSample, NodeFacts, NodeSample
from common.states import NodeStatus, Status
from controller.operations import moves, rounds
from controller.operations.moves import SMALL, worth_another
from controller.records import Node, NodeMode, Operation
from controller.services.journeys import rate_of
from controller.services.nodes import startable
from controller.services.requests import CopySource, CreateBody, RenameBody
from controller.store import containers as rows
from controller.store import nodes as node_rows
from tests.helpers.core import CALLER, FACTS, Core, make_template, open_core

TO_N2 = RenameBody(migration=True, node="n2")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
async def core(template: Path, tmp_path: Path) -> AsyncIterator[Core]:
    opened = await open_core(template, tmp_path / "core")
    yield opened
    await opened.close()


async def move(core: Core, container: str = "c", body: RenameBody = TO_N2) -> Operation:
    accepted = await core.moves.move(CALLER, container, body)
    async with asyncio.timeout(20):
        return await core.engine.wait(accepted.id, None)


def metadata(operation: Operation) -> dict[str, Any]:
    """What the API shows of it."""
    return {key: value for output in operation.outputs.values() for key, value in output.items()}


def told(core: Core) -> list[str]:
    """What the nodes have carried out, in words; both ends of a round are one."""
    found = []
    for node, arguments in core.there.commands:
        if isinstance(arguments, SendContainer):
            last = " last" if arguments.last else ""
            found.append(f"{node} {'relay' if arguments.route.relay else 'direct'} {arguments.route.round}{last}")
        elif not isinstance(arguments, ReceiveContainer):
            found.append(f"{node} {type(arguments).__name__}")
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Return when it holds; the core's work is all on this loop."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 the scripted nodes tell nobody
            await asyncio.sleep(0.01)


async def set_facts(core: Core, node: str, **changes: Any) -> None:
    """Have a node tell other facts of itself."""
    record = core.fleet.nodes[node].record
    other: Node = msgspec.structs.replace(record, facts=msgspec.structs.replace(FACTS, **changes))
    await core.store.write(lambda transaction: node_rows.rows.replace(transaction, other))


# ---------------------------------------------------------------- the rounds


async def test_what_runs_goes_over_while_it_runs_then_what_changed_then_the_rest(core: Core) -> None:
    ended = await move(core)
    assert ended.status is Status.SUCCESS
    *while_it_runs, stop, rest, start = told(core)[:6]
    # Of 10 MB, then a quarter of the round before each time: the third one is small.
    assert while_it_runs == ["n1 direct 0", "n1 direct 1", "n1 direct 2"]
    assert (stop, rest, start) == ("n1 StopContainer", "n1 direct 3 last", "n2 StartContainer")
    assert sorted(told(core)[6:]) == ["n1 DeleteContainer", "n1 EndTransfer", "n2 EndTransfer"]
    shown = metadata(ended)
    assert (shown["via"], shown["format"]) == ("direct", "btrfs") and "via_reason" not in shown
    assert [one["bytes"] for one in shown["rounds"]] == [10_000_000, 2_500_000, 625_000, 156_250]
    assert shown["bytes"] == 13_281_250
    there = core.there.there["n2", "c"]
    assert (there.status, there.snapshots, there.files) == (Status.RUNNING, {"s0"}, "those of c")


async def test_what_is_stopped_goes_over_in_one_round(core: Core) -> None:
    ended = await move(core, "d")
    assert told(core)[0] == "n1 direct 0 last" and "n2 StartContainer" not in told(core)
    assert ended.status is Status.SUCCESS and "downtime" not in metadata(ended)


@pytest.mark.parametrize(
    ("rounds", "another"),
    [
        ([(10 * SMALL, 5.0)], True),
        ([(10 * SMALL, 0.9)], False),
        ([(SMALL, 5.0)], False),
        ([(100 * SMALL, 9.0), (50 * SMALL, 4.0)], True),
        ([(100 * SMALL, 9.0), (90 * SMALL, 8.0)], False),
        ([(100 * SMALL, 9.0), (120 * SMALL, 9.0)], False),
    ],
)
def test_another_round_is_made_while_it_helps(rounds: list[tuple[int, float]], another: bool) -> None:
    assert worth_another([{"bytes": size, "seconds": seconds} for size, seconds in rounds]) is another


async def test_there_is_an_end_to_rounds_that_shrink(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.core._size", lambda round: 10**12 // 2**round)
    await move(core)
    assert [one for one in told(core) if "direct" in one][-2:] == ["n1 direct 4", "n1 direct 5 last"]


@pytest.mark.parametrize(
    ("facts", "privileged", "wanted"),
    [
        ({}, False, "btrfs"),
        ({"storage": "dir"}, False, "files"),
        ({"id_map": "2000000:65536"}, False, "files"),
        ({"id_map": "2000000:65536"}, True, "btrfs"),
        ({"id_map": None}, False, "files"),
    ],
)
async def test_the_format_is_what_both_nodes_understand(
    core: Core, facts: dict[str, Any], privileged: bool, wanted: str
) -> None:
    await set_facts(core, "n2", **facts)
    if privileged:
        record = (await core.rows())["d"]
        config = {**record.config, "security.privileged": "true"}
        changed = msgspec.structs.replace(record, config=config)
        await core.store.write(lambda transaction: rows.rows.replace(transaction, changed))
        core.there.there["n1", "d"].spec = msgspec.structs.replace(core.there.there["n1", "d"].spec, config=config)
    ended = await move(core, "d")
    assert metadata(ended)["format"] == wanted
    formats = {one.format for _, one in core.there.commands if isinstance(one, SendContainer | ReceiveContainer)}
    assert formats == {wanted}


async def test_a_copy_for_another_kind_of_container_travels_as_files(core: Core) -> None:
    body = CreateBody(CopySource("d"), node="n2", config={"security.privileged": "true"})
    accepted = await core.containers.create(CALLER, "new", body)
    ended = await core.engine.wait(accepted.id, None)
    assert ended.status is Status.SUCCESS and metadata(ended)["format"] == "files"


# ---------------------------------------------------------------- the way


def unreachable_directly(_node: str, arguments: Arguments) -> Exception | None:
    if isinstance(arguments, SendContainer) and arguments.route.address is not None:
        return Unreachable("node n2 cannot be reached at tcp://127.0.0.1:8445")
    return None


async def test_what_cannot_go_directly_goes_by_the_relay_and_later_rounds_at_once(core: Core) -> None:
    core.there.refuse = unreachable_directly
    ended = await move(core)
    assert ended.status is Status.SUCCESS
    assert [one for one in told(core) if "direct" in one or "relay" in one] == [
        "n1 relay 0",
        "n1 relay 1",
        "n1 relay 2",
        "n1 relay 3 last",
    ]
    shown = metadata(ended)
    assert shown["via"] == "relay" and "cannot be reached" in shown["via_reason"]
    assert not core.resources.relay.open_ways
    assert any(command.endswith("copy/do-receive") for command in core.there.abandoned)
    assert core.there.seen().keys() == {("n1", "d"), ("n1", "z"), ("n2", "c")} and not core.there.transfers


async def test_a_node_that_accepts_no_connections_is_not_tried(core: Core) -> None:
    await set_facts(core, "n2", transfer_address=None)
    ended = await move(core, "d")
    assert "n1 relay 0 last" in told(core) and metadata(ended)["via"] == "relay"
    assert "accepts no connections" in metadata(ended)["via_reason"] and not core.there.abandoned


async def test_a_receiver_that_cannot_listen_is_reached_by_the_relay(core: Core) -> None:
    def refuse(_node: str, arguments: Arguments) -> Exception | None:
        if isinstance(arguments, ReceiveContainer) and arguments.route.address is not None:
            return Unreachable("the port is taken")
        return None

    core.there.refuse = refuse
    ended = await move(core, "d")
    assert ended.status is Status.SUCCESS and metadata(ended)["via_reason"] == "the port is taken"


async def test_both_ends_know_each_other_and_share_a_token_that_is_the_same_after_a_restart(core: Core) -> None:
    core.there.hanging = {SendContainer, ReceiveContainer}
    accepted = await core.moves.move(CALLER, "d", TO_N2)
    await until(lambda: len(core.there.waiting) == 2)
    await core.engine.close()
    core.use_engine()
    core.there.hanging = set()
    await core.engine.resume()
    ended = await core.engine.wait(accepted.id, None)
    assert ended.status is Status.SUCCESS
    before = sorted(core.there.waiting, key=lambda one: type(one).__name__)
    again = [one for _, one in core.there.commands if isinstance(one, SendContainer | ReceiveContainer)]
    assert before == sorted(again, key=lambda one: type(one).__name__), "the very same is said again"
    receives, sends = before
    assert isinstance(sends, SendContainer) and isinstance(receives, ReceiveContainer)
    assert sends.route.token == receives.route.token and len(sends.route.token) == 64
    assert (sends.route.peer, receives.route.peer) == ("n2", "n1")
    assert (sends.route.peer_key, receives.route.peer_key) == ("n2" * 20, "n1" * 20)
    assert sends.route.address == receives.route.address == FACTS.transfer_address


async def test_no_token_is_used_twice(core: Core) -> None:
    core.there.refuse = unreachable_directly
    await move(core, "d")
    core.there.refuse = lambda _node, _arguments: None
    await move(core)
    routes = [one.route for _, one in core.there.commands if isinstance(one, SendContainer)]
    assert len({route.token for route in routes}) == len(routes) == 5


# ---------------------------------------------------------------- when it fails


@pytest.mark.parametrize("broken", [SendContainer, ReceiveContainer, StopContainer, StartContainer])
@pytest.mark.parametrize("last", [False, True])
async def test_a_move_that_fails_leaves_it_running_where_it_was_and_nothing_there(
    core: Core, broken: type[Arguments], last: bool
) -> None:
    before = core.there.seen()

    def refuse(node: str, arguments: Arguments) -> Exception | None:
        here = not isinstance(arguments, StartContainer) or node == "n2"
        now = getattr(arguments, "last", last) is last
        return DriverFailed("broken") if type(arguments) is broken and here and now else None

    core.there.refuse = refuse
    ended = await move(core)
    assert ended.status is Status.FAILURE and ended.error is not None and "broken" in ended.error.text
    assert core.there.seen() == before and not core.there.transfers
    assert core.fleet.containers["c"].record.node == "n1"


async def test_it_starts_where_it_was_before_anything_else_when_it_never_started_there(core: Core) -> None:
    """The node that it was to go to may be lost: nobody waits for that while the container is down."""

    def refuse(node: str, arguments: Arguments) -> Exception | None:
        if isinstance(arguments, ReceiveContainer) and arguments.last:
            return DriverFailed("broken")
        return DeadlinePassed("n2 is lost") if node == "n2" and isinstance(arguments, DeleteContainer) else None

    core.there.refuse = refuse
    ended = await move(core)
    assert "could not be undone: n2 is lost" in str(ended.error)
    assert core.there.there["n1", "c"].status is Status.RUNNING
    undone = told(core)[told(core).index("n1 StopContainer") + 1 :]
    assert undone[0].endswith("last") and undone[1] == "n1 StartContainer", undone
    assert sorted(undone[2:]) == ["n1 EndTransfer", "n2 EndTransfer"]


async def test_a_target_that_is_lost_while_it_is_down_is_not_waited_for_long(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOOK_EVERY", "LAST_WORDS"):
        monkeypatch.setattr(rounds, name, 0.01)
    monkeypatch.setattr(moves, "DOWN_PATIENCE", 0.1)
    broken = asyncio.Event()

    def refuse(node: str, arguments: Arguments) -> Exception | None:
        if isinstance(arguments, StopContainer):
            core.fleet.node_status("n2", NodeStatus.OFFLINE, "its power is off")
            core.there.hanging = {ReceiveContainer, DeleteContainer}
        if isinstance(arguments, StartContainer) and node == "n1":
            broken.set()
        return None

    core.there.refuse = refuse
    accepted = await core.moves.move(CALLER, "c", TO_N2)
    async with asyncio.timeout(10):
        await broken.wait()
        await until(lambda: core.there.there["n1", "c"].status is Status.RUNNING)
        await until(lambda: any(isinstance(one, DeleteContainer) for one in core.there.waiting))
        await core.engine.abandon(accepted.id)
        ended = await core.engine.wait(accepted.id, None)
    assert ended.status is Status.FAILURE and "n2 is out of reach" in str(ended.error)


async def test_what_may_have_started_there_is_gone_before_it_starts_where_it_was(core: Core) -> None:
    core.there.refuse = lambda node, one: (
        DriverFailed("broken") if node == "n2" and isinstance(one, StartContainer) else None
    )
    await move(core)
    order = told(core)
    assert order.index("n2 DeleteContainer") < order.index("n1 StartContainer")


async def test_it_does_not_start_where_it_was_while_it_may_run_there(core: Core) -> None:
    def refuse(node: str, arguments: Arguments) -> Exception | None:
        if node == "n2" and isinstance(arguments, StartContainer | DeleteContainer):
            return DeadlinePassed("n2 is lost")
        return None

    core.there.refuse = refuse
    ended = await move(core)
    assert ended.status is Status.FAILURE and "n1 StartContainer" not in told(core)


@pytest.mark.parametrize("fenced", [False, True], ids=["abandoned", "fenced"])
async def test_who_gives_up_on_a_node_where_it_may_run_says_that_it_is_off_or_starts_it_nowhere(
    core: Core, fenced: bool
) -> None:
    def refuse(node: str, arguments: Arguments) -> Exception | None:
        if isinstance(arguments, StopContainer):
            core.there.hanging = {StartContainer}
        return None

    core.there.refuse = refuse
    accepted = await core.moves.move(CALLER, "c", TO_N2)
    async with asyncio.timeout(10):
        await until(lambda: any(isinstance(one, StartContainer) for one in core.there.waiting))
        core.there.hanging = set()
        core.fleet.node_status("n2", NodeStatus.OFFLINE, "its power is off")
        if fenced:
            row = core.fleet.nodes["n2"].record
            fence = msgspec.structs.replace(row, mode=NodeMode.FENCED)
            await core.store.write(lambda transaction: node_rows.rows.replace(transaction, fence))
        await core.engine.abandon(accepted.id)
        ended = await core.engine.wait(accepted.id, None)
    assert ended.status is Status.FAILURE
    assert ("n1 StartContainer" in told(core)) is fenced
    assert fenced or "it is not started where it was" in str(ended.error)


async def test_a_host_that_boots_starts_nothing_that_is_on_its_way_to_another(core: Core) -> None:
    assert "c" in await startable(core.store, core.fleet, "n1")
    core.there.hanging = {StopContainer}
    await core.moves.move(CALLER, "c", TO_N2)
    async with asyncio.timeout(10):
        await until(lambda: bool(core.there.waiting))
    assert "c" not in await startable(core.store, core.fleet, "n1")


async def test_another_one_of_its_id_there_stays(core: Core) -> None:
    def refuse(node: str, arguments: Arguments) -> Exception | None:
        if node == "n2" and isinstance(arguments, DeleteContainer | ReceiveContainer):
            return Conflict("c here is of generation 1", field="generation")
        return None

    core.there.refuse = refuse
    ended = await move(core)
    assert ended.error is not None and "undone" not in ended.error.text
    assert core.there.there["n1", "c"].status is Status.RUNNING and not core.there.transfers


async def test_what_is_complete_does_not_fail_by_a_node_that_is_lost_then(core: Core) -> None:
    def refuse(node: str, arguments: Arguments) -> Exception | None:
        lost = isinstance(arguments, DeleteContainer | EndTransfer) and node == "n1"
        return DeadlinePassed("n1 is lost") if lost else None

    core.there.refuse = refuse
    ended = await move(core)
    assert ended.status is Status.SUCCESS and metadata(ended)["left_behind"] == "n1 is lost"
    assert "c" in core.fleet.nodes["n1"].unclaimed and core.fleet.containers["c"].record.node == "n2"


# ---------------------------------------------------------------- how long it is down


async def test_the_downtime_is_told_apart_from_its_own_shutdown(core: Core) -> None:
    seconds = {StopContainer: 4.0, ReceiveContainer: 1.5, StartContainer: 0.25}

    def refuse(_node: str, arguments: Arguments) -> None:
        if getattr(arguments, "last", True):
            core.clock.advance(seconds.get(type(arguments), 0.0))

    core.there.refuse = refuse
    ended = await move(core)
    assert metadata(ended)["downtime"] == {"seconds": 1.75, "stopping_seconds": 4.0}


async def test_it_is_asked_as_long_as_is_said_and_then_killed(core: Core) -> None:
    def refuse(_node: str, arguments: Arguments) -> Exception | None:
        graceful = isinstance(arguments, StopContainer) and not arguments.force
        return DeadlinePassed("it does not stop") if graceful else None

    core.there.refuse = refuse
    ended = await move(core, body=RenameBody(migration=True, node="n2", timeout=7))
    assert ended.status is Status.SUCCESS
    [stop] = [one for _, one in core.there.commands if isinstance(one, StopContainer)]
    assert stop.force
    assert ended.parameters["timeout"] == 7


async def test_who_forces_does_not_ask(core: Core) -> None:
    await move(core, body=RenameBody(migration=True, node="n2", force=True))
    [stop] = [one for _, one in core.there.commands if isinstance(one, StopContainer)]
    assert stop.force and stop.timeout == 0


# ---------------------------------------------------------------- refreshing


async def test_a_refresh_on_the_same_node_and_on_another(core: Core) -> None:
    for node in ("n1", "n2"):
        if node == "n2":
            await move(core, "d")
        core.there.there[node, "d"].files = "old"
        source = CopySource("c", refresh=True)
        accepted = await core.refreshes.refresh(CALLER, "d", CreateBody(source), source)
        ended = await core.engine.wait(accepted.id, None)
        assert ended.status is Status.SUCCESS
        assert core.there.there[node, "d"].files == "those of c" and not core.there.transfers
        assert core.fleet.containers["d"].record.operation is core.fleet.containers["c"].record.operation is None
    assert metadata(ended)["format"] == "files"


async def test_a_refresh_that_fails_leaves_the_old_files(core: Core) -> None:
    await move(core, "d")
    core.there.there["n2", "d"].files = "old"
    core.there.refusals = {ReceiveContainer: DriverFailed("broken")}
    source = CopySource("c", refresh=True)
    accepted = await core.refreshes.refresh(CALLER, "d", CreateBody(source), source)
    ended = await core.engine.wait(accepted.id, None)
    assert ended.status is Status.FAILURE and core.there.there["n2", "d"].files == "old"
    assert not core.there.transfers and core.fleet.containers["d"].record.operation is None


def test_facts_of_older_agents_are_understood() -> None:
    old = {key: value for key, value in msgspec.to_builtins(FACTS).items() if key not in ("id_map", "transfer_address")}
    facts = msgspec.convert(old, NodeFacts)
    assert (facts.id_map, facts.transfer_address) == (None, None)


# ---------------------------------------------------------------- refused before anything happens


def has_room(core: Core, disk_free: int, disk_usage: int) -> None:
    """What n2 has left, and what the files of c take."""
    core.fleet.nodes["n2"].sample = NodeSample(10**9, disk_free, 0.0, (0.0, 0.0, 0.0), 1.0)
    core.fleet.containers["c"].sample = ContainerSample("c", disk_usage=disk_usage)


async def test_what_has_no_room_there_is_refused(core: Core) -> None:
    has_room(core, disk_free=5_000_000, disk_usage=6_000_000)
    with pytest.raises(NoPlacement, match="5MB of disk free, the files of c take 6MB") as refusal:
        await core.moves.move(CALLER, "c", TO_N2)
    assert refusal.value.field == "node" and refusal.value.details["nodes"].keys() == {"n2"}
    with pytest.raises(NoPlacement):
        await core.containers.create(CALLER, "new", CreateBody(CopySource("c"), node="n2"))
    has_room(core, disk_free=7_000_000, disk_usage=6_000_000)
    assert (await move(core)).status is Status.SUCCESS


@pytest.mark.parametrize("node", ["n1", "n2"])
async def test_an_agent_that_knows_no_transfers_is_named(core: Core, node: str) -> None:
    await set_facts(core, node, capabilities=())
    with pytest.raises(Unsupported, match=f"agent of node {node}") as refusal:
        await core.moves.move(CALLER, "c", TO_N2)
    assert refusal.value.field == "node"
    assert core.fleet.containers["c"].record.operation is None


@pytest.mark.parametrize(
    ("asked", "ceiling", "rate"),
    [
        (None, None, None),
        (None, 10**6, 10**6),
        ("50MB", None, 50 * 10**6),
        ("50MB", 10**6, 10**6),
        ("10kB/s", None, 10**4),
    ],
)
def test_the_ceiling_of_the_settings_holds(asked: str | None, ceiling: int | None, rate: int | None) -> None:
    assert rate_of(asked, ceiling) == rate
