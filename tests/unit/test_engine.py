"""Every kind of operation, through every fault at every step, stopped and resumed at every point: one end, no rests."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from common.clock import timestamp
from common.commands import CreateContainer, ReceiveContainer, StartContainer, StopContainer
from common.errors import Conflict, DriverFailed, NoPlacement, NoSpace, NotFound, Unavailable
from common.reports import ContainerReport, ContainerSpec
from common.states import NodeStatus, Status, may_follow
from controller.operations import execution as execution_module
from controller.operations import recorder as recorder_module
from controller.operations.catalogue import KINDS
from controller.operations.images import DeleteImageParameters, ImportParameters
from controller.operations.kinds import Context, Kind, Step
from controller.operations.states import StateParameters
from controller.records import Operation, Phase
from controller.services.requests import (
    CopySource,
    CreateBody,
    ImageSource,
    RenameBody,
    SnapshotBody,
    StateBody,
    UpdateBody,
)
from controller.store import containers as container_rows
from controller.store import nodes as node_rows
from controller.store.db import Transaction
from tests.helpers.cluster import until
from tests.helpers.core import CALLER, FINGERPRINT, Core, There, make_template, open_core

STARTED = StateParameters("d", "n1", 2, 0, False)
LONG = 7 * 3600.0
DEADLY: tuple[set[str], ...] = (set(), {"after"}, {"cancel"})
"""The faults that are tried with a death of the controller, too."""
Accept = Callable[[Core], Awaitable[Operation]]
UNDONE_WHOLLY = ("container.create", "container.copy", "container.move", "snapshot.create", "container.rename")


def _on_images(kind: str, parameters: Any) -> Accept:
    def accept(core: Core) -> Awaitable[Operation]:
        draft = core.operations.draft(CALLER, kind, containers=(), node=None, parameters=parameters)
        return core.operations.accept(lambda _: draft)

    return accept


ACCEPT: dict[str, Accept] = {
    "container.create": lambda core: core.containers.create(
        CALLER,
        "new",
        CreateBody(ImageSource(properties={"os": "test"}), config={"limits.memory": "200MB"}, node="n1", start=True),
    ),
    "container.update": lambda core: core.changes.update(CALLER, "c", UpdateBody({"limits.memory": "300MB"}), None),
    "container.rename": lambda core: core.changes.rename(CALLER, "d", RenameBody(name="e", hostname="other")),
    "container.delete": lambda core: core.changes.delete(CALLER, "c", force=True),
    "container.start": lambda core: core.states.change(CALLER, "d", StateBody("start")),
    "container.stop": lambda core: core.states.change(CALLER, "c", StateBody("stop")),
    "container.restart": lambda core: core.states.change(CALLER, "c", StateBody("restart")),
    "container.freeze": lambda core: core.states.change(CALLER, "c", StateBody("freeze")),
    "container.unfreeze": lambda core: core.states.change(CALLER, "z", StateBody("unfreeze")),
    "snapshot.create": lambda core: core.states.take_snapshot(CALLER, "c", SnapshotBody("s1")),
    "snapshot.delete": lambda core: core.states.delete_snapshot(CALLER, "c", "s0"),
    "snapshot.restore": lambda core: core.states.restore(CALLER, "c", "s0"),
    "container.copy": lambda core: core.containers.create(
        CALLER, "new", CreateBody(CopySource("d"), node="n2", start=True)
    ),
    "container.move": lambda core: core.moves.move(CALLER, "c", RenameBody(name="m", node="n2", migration=True)),
    "image.import": _on_images("image.import", ImportParameters("upload", "x.tar", ("alias",))),
    "image.delete": _on_images("image.delete", DeleteImageParameters(FINGERPRINT)),
}


class Crash(BaseException):
    """The controller dies here."""


@dataclass
class Script:
    """What goes wrong at which place (`step/do`, `step/undo`), and the number of the point at which it dies."""

    faults: Mapping[str, str]
    die_at: int = -1
    core: Core | None = None
    points: list[str] = field(default_factory=list)
    dead: asyncio.Event = field(default_factory=asyncio.Event)
    cancels: list[asyncio.Future[None]] = field(default_factory=list)

    def reach(self, point: str) -> None:
        self.points.append(point)
        if len(self.points) - 1 == self.die_at:
            self.dead.set()
            raise Crash(point)

    def instrument(self, kind: Kind) -> Kind:
        return replace(kind, steps=tuple(self._step(step) for step in kind.steps))

    def _step(self, step: Step) -> Step:
        return replace(step, do=self._act(step.do), undo=None if step.undo is None else self._act(step.undo))

    def _act(self, act: Callable[[Context], Awaitable[Any]]) -> Callable[[Context], Awaitable[Any]]:
        async def scripted(context: Context) -> Any:
            fault = self.faults.get(context.place)
            if fault == "before":
                raise DriverFailed("it broke before")
            if fault == "late":
                context.resources.clock.advance(LONG)  # type: ignore[attr-defined]
            if fault == "cancel":
                await self._cancel(context)
            output = await act(context)
            self.reach(f"{context.place}/effect")
            if fault == "after":
                raise DriverFailed("it broke after")
            if fault == "bug":
                raise ZeroDivisionError
            return output

        return scripted

    async def _cancel(self, context: Context) -> None:
        """Have somebody cancel the operation while the step runs; where that is refused the step goes on."""
        assert self.core is not None
        if self.core.engine.may_cancel(context.operation):
            self.cancels.append(asyncio.ensure_future(self.core.engine.cancel(context.operation.id)))
            await asyncio.get_running_loop().create_future()
        with pytest.raises(Conflict):
            await self.core.engine.cancel(context.operation.id)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory: what is tried here hundreds of times is not the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


async def run(template: Path, directory: Path, name: str, script: Script) -> tuple[Operation, Any]:
    """Carry an operation out under a script, through the death of its controller; check what holds always."""
    core = script.core = await open_core(template, directory)
    try:
        kinds = {**KINDS, name: script.instrument(KINDS[name])}
        core.use_engine(kinds, script.reach)
        before = core.there.seen()
        accepted = await ACCEPT[name](core)
        async with asyncio.timeout(20):
            ended = await core.engine.wait(accepted.id, None)
        if script.dead.is_set():
            await core.engine.close()
            await core.store.write(lambda _: None)
            core.use_engine(kinds, script.reach)
            await core.engine.resume()
            async with asyncio.timeout(20):
                ended = await core.engine.wait(accepted.id, None)
        await asyncio.gather(*script.cancels)
        assert ended.status is (await core.engine.get(accepted.id)).status
        await check_rests(core, ended, clean=goes_back(KINDS[name], script.faults))
        if script.die_at < 0:
            assert set(core.there.journal) <= core.there.acknowledged
        undone = name in UNDONE_WHOLLY and ended.status is not Status.SUCCESS
        if undone and goes_back(KINDS[name], script.faults):
            assert core.there.seen() == before
        return ended, await summary(core, ended)
    finally:
        await core.close()


async def check_rests(core: Core, ended: Operation, clean: bool) -> None:
    """What holds after every operation, whatever happened to it."""
    states = [record.status for record in core.records_of(ended.id)]
    assert [status.final for status in states].count(True) == 1 and states[-1].final
    assert all(before is after or follows(before, after) for before, after in itertools.pairwise(states))
    rows = await core.rows()
    assert {id: live.record for id, live in core.fleet.containers.items()} == rows
    for row in rows.values():
        assert row.operation is None and row.phase is not Phase.CREATING
        reserved = (0, 0) if row.phase is Phase.FAILED else core.containers.reservation(row.config, row.node)
        assert (row.reserved_memory, row.reserved_disk) == reserved
    whole = {(row.node, id, row.generation) for id, row in rows.items() if row.phase is Phase.READY}
    there = {(node, id, one.spec.generation) for (node, id), one in core.there.there.items()}
    if clean and "left_behind" not in str(ended.outputs):
        assert whole == there
        assert not any(node.unclaimed for node in core.fleet.nodes.values())


def follows(before: Status, after: Status) -> bool:
    """Whether it is a legal change; that a cancel was asked for is written apart, by `mark_cancelling`."""
    heard = may_follow(before, Status.CANCELLING) and may_follow(Status.CANCELLING, after)
    return may_follow(before, after) or (heard and after is Status.CANCELLED)


def goes_back(kind: Kind, faults: Mapping[str, str]) -> bool:
    """Whether rows and nodes must agree in the end: not where an undo fails or what has no way back."""
    names = [step.name for step in kind.steps]
    last = [place for place, fault in faults.items() if fault not in ("cancel", "late")]
    return not any(
        place.endswith("/undo") or names.index(place.removesuffix("/do")) >= kind.shape.no_return for place in last
    )


async def summary(core: Core, ended: Operation) -> Any:
    """What an operation led to, without what differs from run to run."""
    rows = {
        id: (row.node, row.generation, row.phase, row.hostname, row.config) for id, row in (await core.rows()).items()
    }
    snapshots = {id: sorted(live.snapshots) for id, live in core.fleet.containers.items()}
    commands = {command.removeprefix(ended.id) for command in core.there.journal}
    seen = str(core.there.seen()).replace(ended.id, "")
    return ended.status, rows, snapshots, sorted(core.fleet.images), seen, commands


def faults_of(kind: Kind) -> list[dict[str, str]]:
    """Nothing wrong, each fault at each step, and each undo failing after each step that fails."""
    scripts: list[dict[str, str]] = [{}]
    for position, step in enumerate(kind.steps):
        scripts += [{f"{step.name}/do": fault} for fault in ("before", "after", "bug", "late", "cancel")]
        undoable = [before.name for before, can in zip(kind.steps, kind.shape.undoable, strict=True) if can]
        reached = [name for name in undoable if name in [before.name for before in kind.steps[: position + 1]]]
        if position < kind.shape.no_return:
            scripts += [{f"{step.name}/do": "after", f"{name}/undo": "before"} for name in reached]
    return scripts


def expected(kind: Kind, faults: Mapping[str, str]) -> Status:
    """How an operation ends."""
    if not faults:
        return Status.SUCCESS
    place, fault = next(iter(faults.items()))
    position = [step.name for step in kind.steps].index(place.removesuffix("/do"))
    if fault == "cancel":
        return Status.CANCELLED if position < kind.shape.no_return else Status.SUCCESS
    return Status.FAILURE


def test_every_kind_is_tried() -> None:
    assert ACCEPT.keys() == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
async def test_every_fault_at_every_step_and_every_point(template: Path, memory: Path, name: str) -> None:
    numbers = itertools.count()
    for faults in faults_of(KINDS[name]):
        calm = Script(faults)
        ended, wanted = await run(template, memory / str(next(numbers)), name, calm)
        excused = "late" in faults.values() or "left_behind" in str(ended.outputs)
        assert excused or ended.status is expected(KINDS[name], faults), (faults, ended.error)
        deaths = [Script(faults, die_at=point) for point in range(len(calm.points))]
        if set(faults.values()) in DEADLY:
            runs = (run(template, memory / str(next(numbers)), name, death) for death in deaths)
            for death, (_, reached) in zip(deaths, await asyncio.gather(*runs), strict=True):
                assert death.dead.is_set()
                assert reached == wanted, (faults, calm.points[death.die_at])


# ---------------------------------------------------------------- what one kind is enough for


@pytest.fixture
async def core(template: Path, memory: Path) -> AsyncIterator[Core]:
    core = await open_core(template, memory / "core")
    yield core
    await core.close()


async def ended(core: Core, operation: Operation) -> Operation:
    async with asyncio.timeout(20):
        return await core.engine.wait(operation.id, None)


async def test_a_command_is_given_up_when_its_operation_is_cancelled_or_late(core: Core, monkeypatch: Any) -> None:
    core.there.hanging.add(StartContainer)
    monkeypatch.setattr(execution_module, "ABANDON_TIME", 0.01)
    operation = await ACCEPT["container.start"](core)
    assert (await core.engine.wait(operation.id, 0.01)).status is Status.RUNNING
    await core.engine.cancel(operation.id)
    assert (await ended(core, operation)).status is Status.CANCELLED
    draft = core.operations.draft(CALLER, "container.start", containers=(), node="n1", parameters=STARTED)
    deadline = timestamp(core.clock.now() + timedelta(seconds=0.01))
    operation = await core.operations.accept(lambda _: structs.replace(draft, deadline_at=deadline))
    late = await ended(core, operation)
    assert late.status is Status.FAILURE and late.error is not None and late.error.code == "deadline-passed"
    assert len(core.there.abandoned) == 2


async def test_what_waits_for_a_lost_node_is_abandoned_and_undone_elsewhere(core: Core) -> None:
    core.there.hanging.add(ReceiveContainer)
    moving = await ACCEPT["container.move"](core)
    await until(lambda: any(isinstance(each, ReceiveContainer) for each in core.there.waiting), "it waits for n2")
    with pytest.raises(Conflict, match="no node that is out of reach"):
        await core.engine.abandon(moving.id)
    core.fleet.node_status("n2", NodeStatus.OFFLINE, "gone")
    await core.engine.abandon(moving.id)
    over = await core.engine.get(moving.id)
    assert over.status is Status.FAILURE
    assert over.error is not None and over.error.code == "abandoned" and "n2" in over.error.text
    assert core.there.there["n1", "c"].status is Status.RUNNING, "the source runs again"
    row = (await core.rows())["c"]
    assert (row.node, row.operation) == ("n1", None)
    with pytest.raises(Conflict, match="ended already"):
        await core.engine.abandon(moving.id)


async def test_an_abandoned_start_ends_at_once_and_frees_its_container(core: Core) -> None:
    core.there.hanging.add(StartContainer)
    starting = await ACCEPT["container.start"](core)
    await until(lambda: core.there.waiting, "it waits for n1")
    core.fleet.node_status("n1", NodeStatus.OFFLINE, "gone")
    await core.engine.abandon(starting.id)
    over = await core.engine.get(starting.id)
    assert (over.status, over.error and over.error.code) == (Status.FAILURE, "abandoned")
    assert all(row.operation is None for row in (await core.rows()).values())


async def test_a_full_disk_delays_an_operation_and_forgets_nothing(core: Core, monkeypatch: Any) -> None:
    monkeypatch.setattr(recorder_module, "RETRY_DELAY", 0.01)
    write, failures = core.store.write, iter([NoSpace("full"), Unavailable("locked")])

    async def failing(work: Callable[[Transaction], Any]) -> Any:
        for failure in failures:
            raise failure
        return await write(work)

    operation = await ACCEPT["container.start"](core)
    monkeypatch.setattr(core.store, "write", failing)
    assert (await ended(core, operation)).status is Status.SUCCESS
    assert next(failures, None) is None


async def test_what_cannot_be_recorded_ends_and_frees_its_containers(core: Core) -> None:
    create = KINDS["container.create"]

    def broken(_transaction: Transaction, _operation: Operation) -> None:
        raise KeyError("a fault")

    core.use_engine({**KINDS, create.name: replace(create, succeeded=broken)})
    operation = await ended(core, await ACCEPT[create.name](core))
    assert operation.status is Status.FAILURE and operation.error is not None and operation.error.code == "internal"
    row = (await core.rows())["new"]
    assert row.operation is None and row.phase is Phase.FAILED and row.error
    assert (await ended(core, await core.changes.delete(CALLER, "new", force=True))).status is Status.SUCCESS


async def test_an_output_that_cannot_be_stored_ends_the_operation(core: Core) -> None:
    async def odd(_context: Context) -> Any:
        return {"what": object()}

    start = KINDS["container.start"]
    core.use_engine({**KINDS, start.name: replace(start, steps=(Step("start", odd),))})
    assert (await ended(core, await ACCEPT[start.name](core))).status is Status.FAILURE
    assert (await core.rows())["d"].operation is None


async def test_an_operation_of_an_unknown_kind_is_ended_at_the_start(core: Core) -> None:
    core.there.hanging.add(StartContainer)
    operation = await ACCEPT["container.start"](core)
    await core.engine.close()
    core.use_engine({name: kind for name, kind in KINDS.items() if name != operation.kind})
    await core.engine.resume()
    assert (await core.engine.get(operation.id)).status is Status.FAILURE
    assert (await core.rows())["d"].operation is None


@pytest.mark.parametrize("name", ["container.create", "container.copy", "container.move"])
async def test_a_container_of_nobodys_in_the_way_is_left_alone(core: Core, name: str) -> None:
    node, id = {"container.create": ("n1", "new"), "container.copy": ("n2", "new")}.get(name, ("n2", "m"))
    spec = ContainerSpec(id, 0, "by-hand", "", {})
    core.there.there[node, id] = There(spec)
    maker = {"container.create": CreateContainer, "container.copy": ReceiveContainer}.get(name, ReceiveContainer)
    core.there.refusals[maker] = Conflict("it exists already")
    operation = await ended(core, await ACCEPT[name](core))
    assert operation.status is Status.FAILURE
    assert core.there.there[node, id].spec == spec
    # Once the node has reported it, the request is refused at once.
    core.fleet.state_changed(node, ContainerReport("other", 0, 102), removed=False)
    with pytest.raises(NoPlacement, match="unmanaged"):
        await core.containers.create(
            CALLER, "other", CreateBody(ImageSource(properties={"os": "test"}), config={}, node=node)
        )


async def test_a_move_holds_its_place_on_the_target(core: Core) -> None:
    core.there.hanging.add(StopContainer)
    await core.moves.move(CALLER, "c", RenameBody(node="n2", migration=True))
    reserved = await core.store.write(container_rows.reserved_by_node)
    assert (reserved["n1"].memory, reserved["n2"].memory) == (300 * 10**6, 100 * 10**6)
    assert reserved["n2"].containers == 1
    assert await core.store.read(lambda connection: node_rows.is_used(connection, "n2"))


async def test_cancelling_what_is_over_or_unknown_is_refused(core: Core) -> None:
    operation = await ended(core, await ACCEPT["container.start"](core))
    with pytest.raises(Conflict):
        await core.engine.cancel(operation.id)
    with pytest.raises(NotFound):
        await core.engine.cancel("no-such-operation")
