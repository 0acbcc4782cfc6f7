"""Whether a command may run: decided from what is known, without any I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.commands import RenameContainer, target_of
from common.errors import Stale, VzfleetError
from common.messages import Command, Result


@dataclass(frozen=True)
class Record:
    """What the journal knows of a command; `result` is None until it is finished."""

    command: str
    result: Result | None


@dataclass(frozen=True)
class Fences:
    """What a command is measured against. `highest` maps a container to the highest generation journalled for it."""

    session: str
    epoch: int
    highest: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """Carry it out; `again` when it was begun before a restart."""

    again: bool


@dataclass(frozen=True)
class Answer:
    """It is finished: send what it led to."""

    result: Result


@dataclass(frozen=True)
class Refuse:
    """Never run it."""

    error: VzfleetError


def decide(command: Command, record: Record | None, fences: Fences, now: float) -> Run | Answer | Refuse:
    """What to do with a command that arrived at `now` on the agent's monotonic clock."""
    if record is not None and record.result is not None:
        return Answer(record.result)
    if command.session != fences.session:
        return Refuse(Stale(f"the command is of session {command.session!r}, not of the current one"))
    if command.epoch < fences.epoch:
        return Refuse(Stale(f"the command is of epoch {command.epoch}, and {fences.epoch} was seen", field="epoch"))
    # Written so that a NaN is refused, too. Once accepted it may wait for its turn: the controller knows of it.
    if not command.expires_at > now:
        return Refuse(Stale(f"the command expired {now - command.expires_at:.3f} s ago"))
    refusal = outdated(command, fences)
    return Refuse(refusal) if refusal is not None else Run(again=record is not None)


def outdated(command: Command, fences: Fences) -> Stale | None:
    """Why a later generation forbids a command: asked on arrival, and again when it has waited for its turn.

    A name that a container is given may be of an earlier, younger container: only the one worked on counts.
    """
    container = target_of(command.arguments)
    highest = fences.highest.get(container, 0) if container is not None else 0
    if command.generation < highest:
        return Stale(
            f"the command is of generation {command.generation}, and {container} is of {highest}", field="generation"
        )
    return None


def containers_of(command: Command) -> tuple[str, ...]:
    """The ids which a command takes for itself: the one that it works on, and a new name."""
    target = target_of(command.arguments)
    if target is None:
        return ()
    if isinstance(command.arguments, RenameContainer) and command.arguments.spec.id != target:
        return (target, command.arguments.spec.id)
    return (target,)
