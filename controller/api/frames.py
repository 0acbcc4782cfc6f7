"""Frames of /1.0/events: LXD's event objects as text frames of a websocket, the same bytes for every client."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

import msgspec
import orjson

from common.clock import timestamp
from controller.api.views import container_url, operation_view, rendered
from controller.fleet import Fleet
from controller.records import Event, EventType, Operation
from controller.services.operations import Operations
from controller.subscriptions import Renderer, Resync

PROJECT = "default"
_TEXT = 0x81
"""FIN and the opcode of a text frame (RFC 6455, 5.2)."""


def text_frame(payload: bytes) -> bytes:
    """An unmasked text frame, as servers send it (RFC 6455, 5.2)."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", _TEXT, size) + payload
    if size < 2**16:
        return struct.pack("!BBH", _TEXT, 126, size) + payload
    return struct.pack("!BBQ", _TEXT, 127, size) + payload


class Frames(Renderer):
    """Renders what subscribers are sent."""

    def __init__(self, fleet: Fleet, operations: Operations) -> None:
        self._fleet = fleet
        self._operations = operations

    def event(self, event: Event) -> bytes:
        """LXD's event object, with its number as `sequence`."""
        view = self._operation(event) if event.type is EventType.OPERATION else _lifecycle(event)
        return _object(event.type, event.at, event.node or "", view, sequence=event.sequence)

    def resync(self, resync: Resync) -> bytes:
        """That events after `since` are missing: read everything anew; what follows comes after `sequence`."""
        view = {"since": resync.since, "reason": "the events after this one are no longer kept: read everything anew"}
        return _object("resync", timestamp(datetime.now(UTC)), "", view, sequence=resync.sequence)

    def metric(self, container: str) -> bytes:
        """The present figures as GET of its state shows them; nothing while there are none."""
        live = self._fleet.containers.get(container)
        if live is None or live.sampled_at is None:
            return b""
        view = {
            "container": container,
            "source": container_url(container),
            "state": orjson.Fragment(rendered(self._fleet, live, "state")),
        }
        at = timestamp(datetime.fromtimestamp(live.sampled_at, UTC))
        return _object("metric", at, live.record.node, view)

    def progress(self, operation: str) -> bytes:
        """The operation as it is now, without a number, since it is not kept; nothing once it has ended."""
        live = self._operations.under_way(operation)
        if live is None:
            return b""
        view = operation_view(live, self._operations)
        return _object(EventType.OPERATION, timestamp(datetime.now(UTC)), live.node or "", view)

    def _operation(self, event: Event) -> dict[str, Any]:
        operation = msgspec.convert(event.body, Operation, strict=False)
        return operation_view(operation, self._operations)


def _lifecycle(event: Event) -> dict[str, Any]:
    return {"action": event.action, "source": event.source, "project": PROJECT, **event.body}


def _object(type: str, at: str, location: str, metadata: dict[str, Any], **more: int) -> bytes:
    whole = {"type": type, "timestamp": at, "location": location, "project": PROJECT, "metadata": metadata, **more}
    return text_frame(orjson.dumps(whole))
