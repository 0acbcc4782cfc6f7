"""A kind of operation under a script of faults: carried out, died in, resumed, and what must hold of it afterwards."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import Conflict, DriverFailed
from common.states import Status, may_follow
from controller.operations.catalogue import KINDS
from controller.operations.kinds import Context, Kind, Step
from controller.records import NodeMode, Operation, Phase
from tests.helpers.accepting import ACCEPT
from tests.helpers.core import Core, open_core

LONG = 25 * 3600.0
PATIENCE = 20.0
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
UNDONE_WHOLLY = (
    "container.create",
    "container.copy",
    "container.move",
    "snapshot.create",
    "container.rename",
    "container.recover",
)


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
            if fault == "twice":
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


async def run(
    template: Path, directory: Path, name: str, script: Script, kind: Kind | None = None
) -> tuple[Operation, Any]:
    """Carry an operation out under a script, through the death of its controller; check what holds always.

    `kind` is what is tried in place of the catalogue's. Returns the ended operation, and what it led to.
    """
    core = script.core = await open_core(template, directory)
    try:

        def reach(point: str) -> None:
            # Operations that only prepare for it, and its children, do not die.
            if point.startswith(f"{name}/"):
                script.reach(point)

        kinds = {**KINDS, name: script.instrument(kind or KINDS[name])}
        core.use_engine(kinds, reach)
        before = core.there.seen()
        accepted = await ACCEPT[name](core)
        async with asyncio.timeout(PATIENCE):
            ended = await core.engine.wait(accepted.id, None)
        if script.dead.is_set():
            await core.engine.close()
            await core.store.write(lambda _: None)
            core.use_engine(kinds, reach)
            await core.engine.resume()
            async with asyncio.timeout(PATIENCE):
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
    # What is on a host that is off is nobody's until it is back.
    off = {name for name, node in core.fleet.nodes.items() if node.record.mode is NodeMode.FENCED}
    ready = {id: row for id, row in rows.items() if row.phase is Phase.READY and row.node not in off}
    whole = {(row.node, id, row.generation) for id, row in ready.items()}
    there = {(node, id, one.spec.generation) for (node, id), one in core.there.there.items() if node not in off}
    there -= core.strays
    if clean and "left_behind" not in str(ended.outputs):
        assert whole == there
        assert not core.there.transfers, "what transfers keep on the nodes is removed"
        strays = {(name, id) for name, node in core.fleet.nodes.items() for id in node.unclaimed}
        assert strays <= {(node, id) for node, id, _ in core.strays}


def follows(before: Status, after: Status) -> bool:
    """Whether it is a legal change; that a cancel was asked for is written apart, by `mark_cancelling`."""
    heard = may_follow(before, Status.CANCELLING) and may_follow(Status.CANCELLING, after)
    return may_follow(before, after) or (heard and after is Status.CANCELLED)


def goes_back(kind: Kind, faults: Mapping[str, str]) -> bool:
    """Whether rows and nodes must agree in the end: not where an undo fails or what has no way back."""
    names = [step.name for step in kind.steps]
    last = [place for place, fault in faults.items() if fault not in ("cancel", "late", "twice")]
    return not any(
        place.endswith("/undo") or names.index(place.removesuffix("/do")) >= kind.shape.no_return for place in last
    )


async def summary(core: Core, ended: Operation) -> Any:
    """What an operation led to, without what differs from run to run."""
    rows = {
        id: (row.node, row.generation, row.phase, row.hostname, row.config) for id, row in (await core.rows()).items()
    }
    snapshots = {id: sorted(live.snapshots) for id, live in core.fleet.containers.items()}
    # What is sent anew after a death is a command of its own, and leads to the same.
    commands = {_ID.sub("", command).partition("~")[0] for command in core.there.journal}
    seen = _ID.sub("", str(core.there.seen()))
    return ended.status, rows, snapshots, sorted(core.fleet.images), seen, commands


def led_to(reached: Any, wanted: Any) -> bool:
    """Whether a run through a death led to the same; it may have undone steps of which it did not know whether."""
    *what, commands = reached
    *same, known = wanted
    return what == same and known <= commands and all(one.endswith("/undo") for one in commands - known)


def faults_of(kind: Kind) -> list[dict[str, str]]:
    """Nothing wrong, each fault at each step, and each undo failing after each step that fails."""
    scripts: list[dict[str, str]] = [{}]
    for position, step in enumerate(kind.steps):
        scripts += [{f"{step.name}/do": fault} for fault in ("before", "after", "bug", "late", "cancel", "twice")]
        undoable = [before.name for before, can in zip(kind.steps, kind.shape.undoable, strict=True) if can]
        reached = [name for name in undoable if name in [before.name for before in kind.steps[: position + 1]]]
        if position < kind.shape.no_return:
            scripts += [{f"{step.name}/do": "after", f"{name}/undo": "before"} for name in reached]
            scripts.append({f"{step.name}/do": "after", **{f"{name}/undo": "twice" for name in reached}})
    return scripts


def expected(kind: Kind, faults: Mapping[str, str]) -> Status:
    """How an operation ends."""
    if set(faults.values()) <= {"twice"}:
        return Status.SUCCESS
    place, fault = next(iter(faults.items()))
    position = [step.name for step in kind.steps].index(place.removesuffix("/do"))
    if fault == "cancel":
        return Status.CANCELLED if position < kind.shape.no_return else Status.SUCCESS
    return Status.FAILURE
