"""How an operation proceeds: state in, decision out. No I/O, no clock.

An operation does its steps in order. When one fails, is cancelled or runs out of time, the steps are undone from
that one backwards, each undo being able to find nothing to do. What has passed its point of no return goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from common.errors import Cancelled, VzfleetError
from common.states import Status
from controller.records import Operation, OperationError


@dataclass(frozen=True)
class Shape:
    """What the machine must know of a kind: for each step whether it can be undone; after which none is any more.

    `no_return` is the index of the first step that is never undone nor interrupted (the number of steps if none).
    """

    undoable: tuple[bool, ...]
    no_return: int

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.undoable)


@dataclass(frozen=True)
class State:
    """Where an operation stands. `position` is the next step to do, or the next one to undo (-1: all undone)."""

    status: Status = Status.PENDING
    undoing: bool = False
    position: int = 0
    error: OperationError | None = None

    @classmethod
    def of(cls, operation: Operation) -> State:
        """Where an operation's row says that it stands."""
        return cls(operation.status, operation.undoing, operation.position, operation.error)


class Act(StrEnum):
    """What to do next."""

    DO = "do"
    UNDO = "undo"
    END = "end"


@dataclass(frozen=True)
class Decision:
    """The next act and its step (meaningless at the end)."""

    act: Act
    step: int = 0


def decide(shape: Shape, state: State) -> Decision:
    """What comes next. A step without undo is passed over on the way back."""
    if not state.undoing:
        return Decision(Act.DO, state.position) if state.position < shape.steps else Decision(Act.END)
    if state.position >= shape.no_return:
        return Decision(Act.END)
    step = state.position
    while step >= 0 and not shape.undoable[step]:
        step -= 1
    return Decision(Act.UNDO, step) if step >= 0 else Decision(Act.END)


def may_cancel(shape: Shape, state: State) -> bool:
    """Whether a cancel would be heard: before the point of no return, and not on the way back already."""
    return not state.status.final and not state.undoing and state.position < shape.no_return


def done(state: State) -> State:
    """The step at `position` is done."""
    return replace(state, status=_running(state), position=state.position + 1)


def failed(state: State, error: VzfleetError) -> State:
    """The step at `position` failed or was interrupted: undo from it backwards. The first reason is kept."""
    why = state.error or OperationError(error.code, error.text, state.position)
    status = Status.CANCELLING if isinstance(error, Cancelled) else _running(state)
    return replace(state, status=status, undoing=True, error=why)


def from_the_furthest(shape: Shape, state: State) -> State:
    """A failed operation of which it is not known how far it was: undo all that it may have begun with."""
    return replace(state, position=max(state.position, shape.no_return - 1))


def undone(state: State, step: int) -> State:
    """The step is undone: go on with the one before."""
    return replace(state, position=step - 1)


def undo_failed(state: State, error: VzfleetError) -> State:
    """An undo failed for good: nothing before it may be undone either, since it may still hold. Ends the operation."""
    first = state.error.text if state.error else ""
    text = f"{first}; and it could not be undone: {error.text}" if first else error.text
    return replace(state, position=-1, error=OperationError(error.code, text))


def final_status(state: State) -> Status:
    """The terminal status of a state for which `decide` says END."""
    if not state.undoing:
        return Status.SUCCESS
    cancelled = state.error is not None and state.error.code == Cancelled.code
    return Status.CANCELLED if cancelled and state.status is Status.CANCELLING else Status.FAILURE


def _running(state: State) -> Status:
    return Status.RUNNING if state.status is Status.PENDING else state.status
