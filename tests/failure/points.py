"""The fail points of operations, and what operations do when nothing disturbs them.

The points are derived from the catalogue of kinds; what each step does at the driver is learned from a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from controller.operations.catalogue import KINDS
from controller.operations.kinds import Kind
from tests.failure.fleet import ProcessFleet
from tests.failure.invariants import rows
from tests.failure.scenarios import SCENARIOS, clean_up, new_name

BOUNDARIES = ("begin", "carried-out", "done")
"""Where the engine can be stopped at a step: before it, after it and before its commit, after its commit."""
COMMANDS_IN_ORDER = "SELECT id FROM commands ORDER BY number"
Effects = list[tuple[str, str]]
"""What an operation does at the driver: step with `/do` (and what follows), and the driver's command."""


# ---------------------------------------------------------------- fail points


@dataclass(frozen=True)
class Point:
    """A fail point of the engine: where, and (on the way back) the step to whose failure it owes that it is reached."""

    kind: str
    step: int
    act: str
    boundary: str

    @property
    def name(self) -> str:
        """As the engine calls it."""
        return f"{self.kind}/{KINDS[self.kind].steps[self.step].name}/{self.act}/{self.boundary}"


def points(kind: Kind) -> Iterator[Point]:
    """Every boundary of every step of a kind: forward, and back where the step can be undone."""
    for index in range(len(kind.steps)):
        acts = ("do", "undo") if kind.shape.undoable[index] else ("do",)
        for act in acts:
            for boundary in BOUNDARIES:
                yield Point(kind.name, index, act, boundary)


def all_points() -> list[Point]:
    """The points of all kinds that have a scenario, so that neighbours are of different kinds where that can be."""
    columns = [list(points(KINDS[kind])) for kind in SCENARIOS]
    longest = max(len(column) for column in columns)
    return [column[row] for row in range(longest) for column in columns if row < len(column)]


# ---------------------------------------------------------------- what is learned


@dataclass(frozen=True)
class Learned:
    """What an operation does when nothing disturbs it: its effects as (node, step with `/do…`, driver's command), and
    the commands that each node journals for it, as (node, `step/do…`)."""

    effects: list[tuple[str, str, str]]
    commands: list[tuple[str, str]]

    @property
    def expected(self) -> Effects:
        """What must be done once for each that says Success."""
        return [(step, command) for _, step, command in self.effects]


def learn(fleet: ProcessFleet, kind: str, turn: tuple[str, dict[str, Any]] | None = None) -> Learned:
    """Have an operation run to its end; with `turn` (see `fault_for`) it turns back."""
    container = new_name()
    SCENARIOS[kind].prepare(fleet, container)
    if turn is not None:
        fleet.script(turn[0], faults=[turn[1]])
    identity = SCENARIOS[kind].ask(fleet, container).operation
    assert identity is not None, kind
    ended = fleet.operation(identity)
    assert ended["status"] == ("Failure" if turn else "Success"), ended
    if turn is not None:
        fleet.script(turn[0])
    clean_up(fleet, container)
    effects = [(node, each, command) for node, command, _, each in fleet.effects()]
    commands = [
        (node, each) for node in fleet.nodes for (each,) in rows(fleet.state(node) / "journal.db", COMMANDS_IN_ORDER)
    ]
    steps = [step.name for step in KINDS[kind].steps]
    own = f"{identity}/"
    found = [(node, each.removeprefix(own), command) for node, each, command in effects if each.startswith(own)]
    return Learned(
        sorted(found, key=lambda each: steps.index(each[1].partition("/")[0])),
        [(node, each.removeprefix(own)) for node, each in commands if each.startswith(own)],
    )


def fault_for(kind: Kind, step: int, learned: Learned) -> tuple[str, dict[str, Any]]:
    """The node and the scripted fault by which an operation turns back and comes to undo this step.

    The last step that does something fails before its effect, or the step itself after its own.
    """
    names = [each.name for each in kind.steps]
    effects = [(names.index(place.partition("/")[0]), node, command) for node, place, command in learned.effects]
    later = [each for each in effects if step < each[0] < kind.shape.no_return]
    own = [each for each in effects if each[0] == step]
    # The last of them: earlier rounds of a transfer may do the same command.
    _, node, command = (later or own)[-1]
    return node, {"command": command, "when": "before" if later else "after", "text": "scripted to turn back"}
