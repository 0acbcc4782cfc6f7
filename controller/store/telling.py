"""What there is to tell of a transaction: from the records that it changed to events. Pure.

An operation tells each of its records. A container tells what an operation made of it when that ends, since the row
alone says less; a row which an operation only holds, or makes room for, tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from common.states import Status
from controller.records import (
    Change,
    Container,
    Event,
    EventType,
    Image,
    Node,
    Operation,
    Phase,
    Record,
    Snapshot,
)
from controller.store.telling_images import told_of_images

MADE: Mapping[str, str] = {
    "container.create": "container-created",
    "container.copy": "container-created",
    "container.start": "container-started",
    "container.stop": "container-stopped",
    "container.restart": "container-restarted",
    "container.freeze": "container-paused",
    "container.unfreeze": "container-resumed",
    "container.update": "container-updated",
    "container.rename": "container-renamed",
    "container.recover": "container-recovered",
    "container.recover-by-copy": "container-recovered",
    "snapshot.restore": "container-restored",
    "container.adopt": "container-adopted",
}
"""What an operation that succeeded made of its container; of a kind that is not here it was updated."""
QUIET = ("container.move", "snapshot.create", "snapshot.delete", "snapshot.rename", "snapshot.update", "image.publish")
"""Kinds that have told all before their end, or by other rows."""


def draft(
    action: str,
    source: str,
    *,
    container: str | None = None,
    node: str | None = None,
    name: str = "",
    context: Mapping[str, Any] | None = None,
    operation: Operation | None = None,
) -> Event:
    """A lifecycle event that has neither number nor time yet. `operation` says who asked for it."""
    requestor = msgspec.to_builtins(operation.requestor) if operation is not None else None
    about = dict(context or {})
    if operation is not None:
        about["operation"] = f"/1.0/operations/{operation.id}"
    body = {"context": about, "requestor": requestor, "name": name or container or node or ""}
    return Event(0, "", EventType.LIFECYCLE, action, source, container, node, body)


def derive(changes: Sequence[Change]) -> list[Event]:
    """The events of one transaction's changes, in order, without numbers: what was told by itself comes first."""
    merged = _Merged.of(changes)
    operations = [_Told.of(change) for change in merged.of_kind(Operation)]
    on_node = {one.operation.node: one.operation for one in operations if one is not None}
    at_work = {id: one.operation for one in operations if one is not None for id in one.operation.containers}
    told = [change.record for change in changes if isinstance(change.record, Event)]
    told += [one.event for one in operations if one is not None and one.new]
    for change in merged.of_kind(Container):
        told += _container(change, at_work.get(change.key))
    for change in merged.of_kind(Snapshot):
        told += _snapshot(change, at_work.get(change.key.partition("/")[0]))
    for one in told_of_images(merged.of_kind(Image)):
        told.append(draft(one.action, one.source, name=one.name, context=one.context))
    for change in merged.of_kind(Node):
        told.append(_node(change, on_node.get(change.key)))
    told += [one.event for one in operations if one is not None and not one.new]
    return told


@dataclass(frozen=True)
class _Merged:
    """The last change of each record; one that came and went in the same transaction is none."""

    last: dict[tuple[type[Record], str], Change]

    @classmethod
    def of(cls, changes: Iterable[Change]) -> _Merged:
        last: dict[tuple[type[Record], str], Change] = {}
        new: set[tuple[type[Record], str]] = set()
        before: dict[tuple[type[Record], str], Record | None] = {}
        for change in changes:
            place = (change.kind, change.key)
            if change.new:
                new.add(place)
            first = before.setdefault(place, change.before)
            last[place] = Change(*place, change.record, place in new, first)
        return cls({place: change for place, change in last.items() if change.record is not None or not change.new})

    def of_kind(self, kind: type[Record]) -> Iterator[Change]:
        return (change for change in self.last.values() if change.kind is kind)


@dataclass(frozen=True)
class _Told:
    """An operation with its event."""

    operation: Operation
    event: Event
    new: bool

    @classmethod
    def of(cls, change: Change) -> _Told | None:
        operation = change.record
        if not isinstance(operation, Operation):
            return None
        verb = "created" if change.new else "ended" if operation.status.final else "updated"
        # What it was accepted with is not shown by the API, and may be large.
        body = msgspec.to_builtins(msgspec.structs.replace(operation, parameters={}))
        container = operation.containers[0] if operation.containers else None
        source = f"/1.0/operations/{operation.id}"
        event = Event(0, "", EventType.OPERATION, f"operation-{verb}", source, container, operation.node, body)
        return cls(operation, event, change.new)


def _container(change: Change, operation: Operation | None) -> Iterator[Event]:
    record, id = change.record, change.key
    moving = operation is not None and operation.kind in ("container.rename", "container.move")
    if not isinstance(record, Container):
        if not moving:
            node = operation.node if operation is not None else None
            yield draft("container-deleted", f"/1.0/vz/{id}", container=id, node=node, operation=operation)
        return
    for action, context in _what_became_of(record, change.new, operation):
        yield draft(action, f"/1.0/vz/{id}", container=id, node=record.node, context=context, operation=operation)


def _what_became_of(
    record: Container, new: bool, operation: Operation | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Actions with their context."""
    if new:
        yield "container-creating" if record.phase is Phase.CREATING else "container-created", {}
    elif operation is None:
        yield "container-updated", {}
    elif not operation.status.final:
        if operation.kind == "container.move" and record.node == operation.node:
            yield "container-moved", _from(record, operation)
    elif record.phase is Phase.FAILED:
        yield "container-failed", {"error": record.error}
    elif operation.status is Status.SUCCESS and operation.kind not in QUIET:
        yield MADE.get(operation.kind, "container-updated"), _from(record, operation)
        if operation.parameters.get("start") is True:
            yield "container-started", {}


def _from(record: Container, operation: Operation) -> Mapping[str, Any]:
    """What it was before, as far as the operation says so."""
    context: dict[str, Any] = {}
    old = operation.parameters.get("old")
    if isinstance(old, dict) and old.get("id") not in (None, record.id):
        context["old_name"] = old["id"]
    old_node = operation.parameters.get("source_node")
    if operation.kind.startswith("container.recover") and isinstance(old, dict):
        old_node = old.get("node")
    if old_node not in (None, record.node) and operation.kind not in ("container.copy", "container.refresh"):
        context["old_node"] = old_node
    return context


def _snapshot(change: Change, operation: Operation | None) -> Iterator[Event]:
    container, _, name = change.key.partition("/")
    verb, context = _verb(change), {}
    if operation is not None and operation.kind == "snapshot.rename":
        if change.record is None:
            return  # the row under the new name tells of it
        verb, context = "renamed", {"old_name": operation.parameters["snapshot"]}
    elif change.record is not None and not change.new and (operation is None or operation.kind != "snapshot.update"):
        return  # it follows a container that has got another id
    yield draft(
        f"container-snapshot-{verb}",
        f"/1.0/vz/{container}/snapshots/{name}",
        container=container,
        node=operation.node if operation is not None else None,
        name=change.key,
        context=context,
        operation=operation,
    )


def _node(change: Change, operation: Operation | None) -> Event:
    source, record = f"/1.0/nodes/{change.key}", change.record
    if not isinstance(record, Node):
        return draft("node-removed", source, node=change.key, operation=operation)
    context = {"mode": str(record.mode)}
    if record.fenced_by is not None:
        context["fenced_by"] = record.fenced_by
    action = "node-joined" if change.new else "node-updated"
    return draft(action, source, node=change.key, context=context, operation=operation)


def _verb(change: Change) -> str:
    return "deleted" if change.record is None else "created" if change.new else "updated"
