"""The rows of the store as frozen typed records: what the rest of the controller passes around.

Times are RFC 3339 text in UTC, sizes bytes. A record is never changed: `msgspec.structs.replace` makes the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from msgspec import Struct

from common.reports import NodeFacts
from common.states import Status


class Record(Struct, frozen=True):
    """A row."""


class Phase(StrEnum):
    """Where a container is in its life; between these only operations move it."""

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"


class Node(Record, frozen=True):
    """A host that has joined. `public_key` is its CURVE key in Z85, its identity."""

    name: str
    public_key: str
    added_at: str
    facts: NodeFacts | None = None
    description: str = ""


class Container(Record, frozen=True):
    """A container. `operation` is the one that works on it now; `image` names what was asked for and what it got.

    `reserved_*` is what placement counts for it on its node: bytes, and a number of CPUs.
    """

    id: str
    node: str
    generation: int
    hostname: str
    description: str
    config: dict[str, str]
    image: dict[str, Any] | None
    hwaddr: str
    created_at: str
    phase: Phase
    operation: str | None = None
    error: str | None = None
    reserved_memory: int = 0
    reserved_disk: int = 0


class Snapshot(Record, frozen=True):
    """A snapshot of a container; it carries the configuration of its moment."""

    container: str
    name: str
    created_at: str
    config: dict[str, str]


class Requestor(Record, frozen=True):
    """Who asked: name of the token or certificate, how (`tls`, `unix`), from which address."""

    username: str
    protocol: str
    address: str


class OperationError(Record, frozen=True):
    """Why an operation failed: a code of `common.errors`, the reason as text, and the index of the step that failed."""

    code: str
    text: str
    step: int | None = None


class Operation(Record, frozen=True):
    """An operation. `undoing` and `position` say where it stands: the next step to do, or the next to undo.

    `outputs` holds what each finished step gave, `parameters` what the operation was accepted with.
    """

    id: str
    kind: str
    status: Status
    created_at: str
    updated_at: str
    deadline_at: str
    containers: tuple[str, ...]
    node: str | None
    requestor: Requestor
    request: str
    parameters: dict[str, Any]
    resources: dict[str, list[str]]
    undoing: bool = False
    position: int = 0
    outputs: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    error: OperationError | None = None
    ended_at: str | None = None


class Image(Record, frozen=True):
    """An image whose file the controller holds. `source` is what it was made from, a key that builders know."""

    fingerprint: str
    layout: str
    size: int
    properties: dict[str, str]
    aliases: tuple[str, ...]
    source: str
    filename: str
    created_at: str


class Token(Record, frozen=True):
    """A bearer token; only its sha256 is kept."""

    id: str
    name: str
    role: str
    hash: str
    created_at: str
    expires_at: str | None = None


class JoinToken(Record, frozen=True):
    """A one-time join token; only the sha256 of its secret is kept.

    `used_by` is the CURVE key that used it up: its host may ask again when the answer was lost.
    """

    hash: str
    node: str | None
    expires_at: str
    used_by: str | None = None


@dataclass(frozen=True)
class Change:
    """What a committed transaction did to one record; `record` is None when it is gone."""

    kind: type[Record]
    key: str
    record: Record | None
