"""One request for each kind of operation, what must be there for it, and the fail points that its steps have.

The fail points are derived from the catalogue of kinds; what each step does at the driver is learned from a run that
nothing disturbs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from controller.operations.catalogue import KINDS
from controller.operations.kinds import Kind
from tests.failure.fleet import Answer, ProcessFleet
from tests.failure.invariants import rows
from tests.helpers.busybox import busybox_archive, with_files

EMPTY = {"type": "none"}
IMAGE = {"type": "image", "properties": {"os": "busybox"}}
BOUNDARIES = ("begin", "carried-out", "done")
"""Where the engine can be stopped at a step: before it, after it and before its commit, after its commit."""
COMMANDS_IN_ORDER = "SELECT id FROM commands ORDER BY number"
SOURCE, TARGET = "node1", "node2"
Effects = list[tuple[str, str]]
"""What an operation does at the driver: step with `/do` (and what follows), and the driver's command."""


@dataclass(frozen=True)
class Scenario:
    """How an operation of a kind comes about: `prepare` makes what it needs, `ask` asks for it.

    `prepare` uses no operation of this kind, so that a fail point of the kind is not reached by it.
    """

    kind: str
    prepare: Callable[[ProcessFleet, str], None]
    ask: Callable[[ProcessFleet, str], Answer]


def create(fleet: ProcessFleet, container: str, **options: Any) -> None:
    """An empty container on `SOURCE`."""
    fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY, "node": SOURCE, **options})


def _running(fleet: ProcessFleet, container: str) -> None:
    create(fleet, container, start=True)


def _frozen(fleet: ProcessFleet, container: str) -> None:
    _running(fleet, container)
    fleet.done("PUT", f"/1.0/vz/{container}/state", {"action": "freeze"})


def _with_snapshot(fleet: ProcessFleet, container: str) -> None:
    """Running, changed since its snapshot."""
    _running(fleet, container)
    fleet.done("POST", f"/1.0/vz/{container}/snapshots", {"name": "before"})


def _nothing(_fleet: ProcessFleet, _container: str) -> None:
    return


def _create(fleet: ProcessFleet, container: str) -> Answer:
    body = {"source": IMAGE, "node": SOURCE, "start": True}
    return fleet.request("POST", f"/1.0/vz/{container}", body)


def _update(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("PUT", f"/1.0/vz/{container}", {"config": {"user.changed": container}})


def _rename(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("POST", f"/1.0/vz/{container}", {"name": f"{container}-new", "hostname": "renamed"})


def _delete(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("DELETE", f"/1.0/vz/{container}?force=1")


def _copy(fleet: ProcessFleet, container: str) -> Answer:
    body = {"source": {"type": "copy", "source": container}, "node": TARGET, "start": True}
    return fleet.request("POST", f"/1.0/vz/{container}-copy", body)


def _move(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("POST", f"/1.0/vz/{container}", {"migration": True, "node": TARGET})


def _take(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("POST", f"/1.0/vz/{container}/snapshots", {"name": "taken"})


def _remove(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("DELETE", f"/1.0/vz/{container}/snapshots/before")


def _restore(fleet: ProcessFleet, container: str) -> Answer:
    return fleet.request("PUT", f"/1.0/vz/{container}", {"restore": "before"})


def _upload(fleet: ProcessFleet, alias: str) -> Answer:
    """An image that nothing else has, under an alias."""
    archive = with_files(busybox_archive(), {"own": (0o644, alias.encode())})
    return fleet.request("POST", f"/1.0/images?alias={alias}", archive)


def _image_on_a_node(fleet: ProcessFleet, alias: str) -> None:
    identity = _upload(fleet, alias).operation
    assert identity is not None
    assert fleet.operation(identity)["status"] == "Success"
    create(fleet, alias, source={"type": "image", "alias": alias})


def _delete_image(fleet: ProcessFleet, alias: str) -> Answer:
    return fleet.request("DELETE", images(fleet)[alias])


def _drained(fleet: ProcessFleet, container: str) -> None:
    create(fleet, container)
    fleet.done("POST", f"/1.0/nodes/{SOURCE}/state", {"action": "drain"})


def _node(action: str) -> Callable[[ProcessFleet, str], Answer]:
    return lambda fleet, _container: fleet.request("POST", f"/1.0/nodes/{SOURCE}/state", {"action": action})


def images(fleet: ProcessFleet) -> dict[str, str]:
    """The URL of each image that has an alias, by that."""
    every = fleet.call("GET", "/1.0/images?recursion=1").metadata
    return {each["aliases"][0]["name"]: f"/1.0/images/{each['fingerprint']}" for each in every if each["aliases"]}


def _state(action: str) -> Callable[[ProcessFleet, str], Answer]:
    return lambda fleet, container: fleet.request("PUT", f"/1.0/vz/{container}/state", {"action": action})


SCENARIOS: dict[str, Scenario] = {
    scenario.kind: scenario
    for scenario in (
        Scenario("container.create", _nothing, _create),
        Scenario("container.update", _running, _update),
        Scenario("container.rename", create, _rename),
        Scenario("container.delete", _running, _delete),
        Scenario("container.start", create, _state("start")),
        Scenario("container.stop", _running, _state("stop")),
        Scenario("container.restart", _running, _state("restart")),
        Scenario("container.freeze", _running, _state("freeze")),
        Scenario("container.unfreeze", _frozen, _state("unfreeze")),
        Scenario("snapshot.create", _running, _take),
        Scenario("snapshot.delete", _with_snapshot, _remove),
        Scenario("snapshot.restore", _with_snapshot, _restore),
        Scenario("container.copy", _running, _copy),
        Scenario("container.move", _running, _move),
        Scenario("image.import", _nothing, _upload),
        Scenario("image.delete", _image_on_a_node, _delete_image),
        Scenario("node.drain", _running, _node("drain")),
        Scenario("node.restore", _drained, _node("restore")),
    )
}


WITHOUT = {"container.recover": "container.create", "container.recover-by-copy": "container.copy"}
"""Kinds without a scenario, since a host would have to be off for each, and the kind whose very steps they have."""
CLEANING = ("container.delete", "image.delete", "node.restore")
"""Kinds that `clean_up` uses."""


def new_name() -> str:
    """A container's id that nothing else has."""
    return f"c-{secrets.token_hex(4)}"


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
        """What must be done once for each that says Success; an image is fetched once for all containers of a node."""
        return [(step, command) for _, step, command in self.effects if command != "image.ensure"]


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

    The next step that does something fails before its effect, or the step itself after its own.
    """
    names = [each.name for each in kind.steps]
    effects = [(names.index(place.partition("/")[0]), node, command) for node, place, command in learned.effects]
    later = [each for each in effects if step < each[0] < kind.shape.no_return]
    own = [each for each in effects if each[0] == step]
    _, node, command = (later or own)[0]
    return node, {"command": command, "when": "before" if later else "after", "text": "scripted to turn back"}


def clean_up(fleet: ProcessFleet, container: str) -> None:
    """Remove what a scenario made of a container or image: it too must be free to be deleted."""
    for name in (container, f"{container}-new", f"{container}-copy"):
        if fleet.request("GET", f"/1.0/vz/{name}").code == 200:
            fleet.done("DELETE", f"/1.0/vz/{name}?force=1")
    if fleet.node_status(SOURCE) == "Draining":
        answer = fleet.call("POST", f"/1.0/nodes/{SOURCE}/state", {"action": "restore", "mode": "skip"})
        assert answer.operation is None or fleet.operation(answer.operation)["status"] == "Success"
    if container in (found := images(fleet)):
        fleet.done("DELETE", found[container])
