"""What the engine does beside carrying steps out: giving up, cancelling, full disks, what stands in the way."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from common.clock import timestamp
from common.commands import CreateContainer, DeleteContainer, ReceiveContainer, StartContainer, StopContainer
from common.errors import Cancelled, Conflict, DriverFailed, NoPlacement, NoSpace, NotFound, Unavailable
from common.reports import ContainerReport, ContainerSpec
from common.states import NodeStatus, Status
from controller.operations import execution as execution_module
from controller.operations import kinds as kinds_module
from controller.operations import recorder as recorder_module
from controller.operations.catalogue import KINDS
from controller.operations.kinds import Context, Step
from controller.operations.machine import State
from controller.operations.states import StateParameters
from controller.records import Operation, Phase
from controller.services.requests import (
    CreateBody,
    ImageSource,
    RenameBody,
)
from controller.store import containers as container_rows
from controller.store import nodes as node_rows
from controller.store.db import Transaction
from tests.helpers.accepting import ACCEPT
from tests.helpers.cluster import until
from tests.helpers.core import CALLER, Core, There, make_template, open_core

STARTED = StateParameters("d", "n1", 2, 0, False)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory: what is tried here hundreds of times is not the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


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


async def test_what_a_node_gives_up_unasked_is_a_failure_and_no_cancel(core: Core) -> None:
    core.there.refusals[StartContainer] = Cancelled("the other end was lost")
    over = await ended(core, await ACCEPT["container.start"](core))
    assert over.status is Status.FAILURE
    assert over.error is not None and over.error.code == "unavailable"


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


async def test_an_undo_waits_for_room_on_its_node(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_module, "ROOM_RETRY", 0.01)
    core.there.refusals.update({StartContainer: DriverFailed("broken"), DeleteContainer: NoSpace("full")})
    operation = await ACCEPT["container.create"](core)
    await until(lambda: f"{operation.id}/create/undo~3" in core.there.journal, "it tries again, by another command")
    del core.there.refusals[DeleteContainer]
    over = await ended(core, operation)
    assert over.error is not None and over.error.text == "broken"
    assert ("n1", "new") not in core.there.there


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


async def test_a_cancel_is_not_forgotten_by_a_record_that_was_delayed(core: Core, monkeypatch: Any) -> None:
    monkeypatch.setattr(recorder_module, "RETRY_DELAY", 0.01)
    core.there.hanging.add(StartContainer)
    operation = await ACCEPT["container.create"](core)
    await until(lambda: core.there.waiting, "it has recorded its first steps")
    running = await core.engine.get(operation.id)
    kind, state = KINDS[operation.kind], State.of(running)
    write, failures = core.store.write, iter([NoSpace("full")])
    cancelled: list[bool] = []

    async def failing(work: Callable[[Transaction], Any]) -> Any:
        for failure in failures:
            cancelled.append(True)
            raise failure
        return await write(work)

    monkeypatch.setattr(core.store, "write", failing)
    recorder = recorder_module.Recorder(core.store, core.clock)
    written = await recorder.record(
        kind, running, state, step=None, output=None, over=False, cancelled=lambda: bool(cancelled)
    )
    assert written.status is Status.CANCELLING


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
