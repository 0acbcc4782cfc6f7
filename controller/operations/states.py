"""Starting, stopping, restarting, freezing and unfreezing containers."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from common.commands import Arguments, FreezeContainer, StartContainer, StopContainer, UnfreezeContainer
from controller.operations.kinds import Context, Do, Kind, Step
from controller.operations.power import leaves
from controller.records import Power
from controller.store import containers as rows

GRACE = 60.0
"""Seconds that an operation may take beside the time-out of a graceful stop."""


class StateParameters(Struct, frozen=True):
    """A change of state; `timeout` in seconds is what a graceful stop may take."""

    container: str
    node: str
    generation: int
    timeout: float
    force: bool


def _ask(arguments: Callable[[StateParameters], Arguments]) -> Do:
    async def do(context: Context) -> None:
        wanted = context.parameters(StateParameters)
        await context.command(wanted.node, arguments(wanted), wanted.generation)

    return do


_start = Step("start", _ask(lambda wanted: StartContainer(wanted.container)))
_stop = Step("stop", _ask(lambda wanted: StopContainer(wanted.container, wanted.timeout, wanted.force)))
_freeze = Step("freeze", _ask(lambda wanted: FreezeContainer(wanted.container)))
_unfreeze = Step("unfreeze", _ask(lambda wanted: UnfreezeContainer(wanted.container)))


def _kind(action: str, description: str, power: Power, *steps: Step) -> Kind:
    # Each step is one short command, and none is undone: a container that was asked to stop is not started again.
    return Kind(f"container.{action}", description, steps, GRACE, leaves(power), rows.release)


START = _kind("start", "Starting container", Power.RUNNING, _start)
STOP = _kind("stop", "Stopping container", Power.STOPPED, _stop)
RESTART = _kind("restart", "Restarting container", Power.RUNNING, _stop, _start)
FREEZE = _kind("freeze", "Freezing container", Power.FROZEN, _freeze)
UNFREEZE = _kind("unfreeze", "Unfreezing container", Power.RUNNING, _unfreeze)
