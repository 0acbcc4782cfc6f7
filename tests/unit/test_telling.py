"""What is told of a transaction: pure, from its changes."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from common.states import Status
from controller.operations.catalogue import KINDS
from controller.records import (
    Change,
    Container,
    Event,
    EventType,
    Image,
    Node,
    NodeMode,
    Operation,
    OperationError,
    Phase,
    Requestor,
    Snapshot,
    Token,
)
from controller.store.telling import MADE, QUIET, derive, draft

THEN = "2026-01-01T00:00:00.000000Z"
ROW = Container("c", "n1", 1, "c", "", {}, None, "00:16:3e:00:00:01", THEN, Phase.READY)
OPERATION = Operation(
    id="op",
    kind="container.start",
    status=Status.RUNNING,
    created_at=THEN,
    updated_at=THEN,
    deadline_at=THEN,
    containers=("c",),
    node="n1",
    requestor=Requestor("alice", "tls", "10.0.0.1"),
    request="r1",
    parameters={"secret": "x" * 100},
    resources={"containers": ["/1.0/vz/c"]},
)


def op(kind: str, status: Status = Status.SUCCESS, **fields: Any) -> Operation:
    return replace(OPERATION, kind=kind, status=status, **fields)


def of_operation(operation: Operation, new: bool = False) -> Change:
    return Change(Operation, operation.id, operation, new)


def of_row(row: Container, new: bool = False) -> Change:
    return Change(Container, row.id, row, new)


def actions(*changes: Change) -> list[str]:
    return [event.action for event in derive(changes)]


def test_what_is_accepted_tells_its_operation_and_not_the_lock() -> None:
    locked = of_row(replace(ROW, operation="op"))
    assert actions(locked, of_operation(OPERATION, new=True)) == ["operation-created"]


def test_a_new_row_is_told_after_the_operation_that_makes_it() -> None:
    creating = replace(ROW, phase=Phase.CREATING, operation="op")
    accepted = of_operation(op("container.create", Status.RUNNING), new=True)
    assert actions(of_row(creating, new=True), accepted) == ["operation-created", "container-creating"]


@pytest.mark.parametrize("kind", MADE)
def test_an_end_tells_what_became_of_the_container_and_then_itself(kind: str) -> None:
    assert actions(of_row(ROW), of_operation(op(kind))) == [MADE[kind], "operation-ended"]


def test_every_kind_that_works_on_containers_is_known_or_is_an_update() -> None:
    assert set(MADE) | set(QUIET) <= KINDS.keys()
    assert actions(of_row(ROW), of_operation(op("container.strange"))) == ["container-updated", "operation-ended"]


@pytest.mark.parametrize("status", [Status.FAILURE, Status.CANCELLED])
@pytest.mark.parametrize("kind", MADE)
def test_what_failed_made_nothing(kind: str, status: Status) -> None:
    assert actions(of_row(ROW), of_operation(op(kind, status))) == ["operation-ended"]


def test_a_step_tells_its_operation_only() -> None:
    assert actions(of_operation(op("container.create", Status.RUNNING, position=1))) == ["operation-updated"]
    assert actions(of_operation(op("container.create", Status.CANCELLING))) == ["operation-updated"]


def test_a_creation_that_starts_and_one_that_failed() -> None:
    started = op("container.create", parameters={"start": True})
    assert actions(of_row(ROW), of_operation(started)) == ["container-created", "container-started", "operation-ended"]
    failed = replace(ROW, phase=Phase.FAILED, error="creation failed: no")
    ending = op("container.create", Status.FAILURE, error=OperationError("x", "no"))
    # Its row is written twice in that transaction: told once.
    event, _ = derive([of_row(failed), of_row(failed), of_operation(ending)])
    assert (event.action, event.body["context"]["error"]) == ("container-failed", "creation failed: no")


def test_a_deletion_tells_who_asked_and_where() -> None:
    event, ended = derive([Change(Container, "c", None), of_operation(op("container.delete"))])
    assert event == Event(
        0,
        "",
        EventType.LIFECYCLE,
        "container-deleted",
        "/1.0/vz/c",
        "c",
        "n1",
        {
            "context": {"operation": "/1.0/operations/op"},
            "requestor": {"username": "alice", "protocol": "tls", "address": "10.0.0.1"},
            "name": "c",
        },
    )
    assert ended.type is EventType.OPERATION and ended.source == "/1.0/operations/op"


def test_a_new_name_is_one_event_with_the_old_one() -> None:
    renamed = op("container.rename", containers=("c", "d"), parameters={"old": {"id": "c"}})
    follows = Change(Snapshot, "d/s", Snapshot("d", "s", THEN, {}))
    told = derive([Change(Container, "c", None), of_row(replace(ROW, id="d")), follows, of_operation(renamed)])
    assert [event.action for event in told] == ["container-renamed", "operation-ended"]
    assert (told[0].container, told[0].body["context"]["old_name"]) == ("d", "c")


def test_a_move_is_told_when_the_row_belongs_there() -> None:
    parameters = {"old": {"id": "c"}, "source_node": "n1"}
    move = op("container.move", Status.RUNNING, node="n2", parameters=parameters)
    assert actions(of_row(replace(ROW, operation="op")), of_operation(move, new=True)) == ["operation-created"]
    moved, _ = derive([of_row(replace(ROW, node="n2", operation="op")), of_operation(move)])
    assert (moved.action, moved.node, moved.body["context"]["old_node"]) == ("container-moved", "n2", "n1")
    ended = replace(move, status=Status.SUCCESS)
    assert actions(of_row(replace(ROW, node="n2")), of_operation(ended)) == ["operation-ended"]
    failed = replace(move, status=Status.FAILURE)
    assert actions(of_row(ROW), of_operation(failed)) == ["operation-ended"]


def test_a_recovery_says_where_it_was() -> None:
    old = {"id": "c", "node": "n1"}
    recovered = op("container.recover", node="n2", parameters={"old": old, "start": True})
    told = derive([of_row(replace(ROW, node="n2")), of_operation(recovered)])
    assert [event.action for event in told] == ["container-recovered", "container-started", "operation-ended"]
    assert told[0].body["context"]["old_node"] == "n1"


def test_a_node_that_is_drained_or_fenced() -> None:
    draining = Node("n1", "k" * 40, THEN, mode=NodeMode.DRAINING)
    accepted = of_operation(op("node.drain", Status.RUNNING, containers=()), new=True)
    _, event = derive([Change(Node, "n1", draining), accepted])
    assert event.body["requestor"]["username"] == "alice" and event.body["context"]["mode"] == "draining"
    fenced = replace(draining, mode=NodeMode.FENCED, fenced_at=THEN, fenced_by="bob")
    (event,) = derive([Change(Node, "n1", fenced)])
    assert event.body["context"] == {"mode": "fenced", "fenced_by": "bob"}


def test_snapshots_images_nodes() -> None:
    taken = Change(Snapshot, "c/s", Snapshot("c", "s", THEN, {}), new=True)
    assert actions(taken, of_row(ROW), of_operation(op("snapshot.create"))) == [
        "container-snapshot-created",
        "operation-ended",
    ]
    gone = Change(Snapshot, "c/s", None)
    assert actions(gone, of_row(ROW), of_operation(op("snapshot.delete"))) == [
        "container-snapshot-deleted",
        "operation-ended",
    ]
    kept = Change(Snapshot, "c/s", Snapshot("c", "s", THEN, {}, THEN))
    assert actions(kept, of_row(ROW), of_operation(op("snapshot.update"))) == [
        "container-snapshot-updated",
        "operation-ended",
    ]
    renamed = op("snapshot.rename", parameters={"snapshot": "s", "new": "t"})
    other = Change(Snapshot, "c/t", Snapshot("c", "t", THEN, {}))
    told = derive([other, gone, of_row(ROW), of_operation(renamed)])
    assert [event.action for event in told] == ["container-snapshot-renamed", "operation-ended"]
    assert (told[0].source, told[0].body["context"]["old_name"]) == ("/1.0/vz/c/snapshots/t", "s")
    image = Image("f" * 64, "rootfs", 1, {}, (), "", "", THEN)
    assert actions(Change(Image, image.fingerprint, image, new=True)) == ["image-created"]
    assert actions(Change(Image, image.fingerprint, image)) == ["image-updated"]
    assert actions(Change(Image, image.fingerprint, None)) == ["image-deleted"]
    node = Node("n1", "k" * 40, THEN, mode=NodeMode.DRAINING)
    assert actions(Change(Node, "n1", node, new=True)) == ["node-joined"]
    updated, removed = derive([Change(Node, "n1", node)]), derive([Change(Node, "n1", None)])
    assert (updated[0].action, updated[0].body["context"]) == ("node-updated", {"mode": "draining"})
    assert (removed[0].action, removed[0].node) == ("node-removed", "n1")


def test_what_came_and_went_and_what_is_nobodys_business_is_not_told() -> None:
    assert actions(of_row(ROW, new=True), Change(Container, "c", None)) == []
    assert actions(Change(Token, "t", Token("t", "t", "admin", "h", THEN), new=True)) == []


def test_a_failed_creation_that_is_replaced_is_a_new_one() -> None:
    creating = replace(ROW, phase=Phase.CREATING)
    accepted = of_operation(op("container.create", Status.RUNNING), new=True)
    assert actions(Change(Container, "c", None), of_row(creating, new=True), accepted) == [
        "operation-created",
        "container-creating",
    ]


def test_what_is_told_by_itself_comes_first() -> None:
    note = draft("container-drifted", "/1.0/vz/c", container="c", node="n1", context={"limit": "1GB"})
    assert actions(of_row(ROW), Change(Event, note.source, note)) == ["container-drifted", "container-updated"]
    assert note.body == {"context": {"limit": "1GB"}, "requestor": None, "name": "c"}


def test_no_parameters_are_told() -> None:
    told = derive([of_row(ROW), of_operation(OPERATION, new=True)])
    assert "secret" not in str(told)
