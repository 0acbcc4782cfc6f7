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


class NodeMode(StrEnum):
    """What an operator decided about a node; whether it can be reached is another matter."""

    ACTIVE = "active"
    DRAINING = "draining"
    FENCED = "fenced"


class Power(StrEnum):
    """What the last operation left a container as: what it is found as beside that is drift."""

    RUNNING = "running"
    STOPPED = "stopped"
    FROZEN = "frozen"


class Node(Record, frozen=True):
    """A host that has joined. `public_key` is its CURVE key in Z85, its identity.

    `draining` gets no new containers; `fenced` was stated to be off at `fenced_at` by `fenced_by` (a token's name), so
    that its containers may run elsewhere. One that came back is draining, and keeps both until it is restored.
    """

    name: str
    public_key: str
    added_at: str
    facts: NodeFacts | None = None
    description: str = ""
    mode: NodeMode = NodeMode.ACTIVE
    fenced_at: str | None = None
    fenced_by: str | None = None


class Container(Record, frozen=True):
    """A container. `operation` is the one that works on it now; `image` names what was asked for and what it got.

    `reserved_*` is what placement counts for it on its node, in bytes. `power` is None until an operation decided it.
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
    power: Power | None = None


class Snapshot(Record, frozen=True):
    """A snapshot of a container; it carries the configuration of its moment.

    `expires_at`: it is deleted soon after (None: never). `scheduled`: taken by `snapshots.schedule`, by nobody's word.
    """

    container: str
    name: str
    created_at: str
    config: dict[str, str]
    expires_at: str | None = None
    scheduled: bool = False


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


class ImageOrigin(Record, frozen=True):
    """Where an image came from: `protocol` is `simplestreams` (a server and an alias there) or `direct` (a URL)."""

    protocol: str
    server: str
    alias: str = ""


class Image(Record, frozen=True):
    """An image whose file the controller holds. `source` is what it was made from, a key that builders know.

    `rootfs_offset` in bytes: where in the file the root file system's archive begins (LXD's split format is its
    metadata archive, then that one, and the fingerprint the sha256 of both). `cached`: fetched because a container
    wanted it, and forgotten when nobody does for long. `origin`: from where it came and is refreshed, None for uploads.
    `descriptions` are those of its aliases that have one.
    """

    fingerprint: str
    layout: str
    size: int
    properties: dict[str, str]
    aliases: tuple[str, ...]
    source: str
    filename: str
    created_at: str
    rootfs_offset: int = 0
    public: bool = False
    auto_update: bool = False
    cached: bool = False
    origin: ImageOrigin | None = None
    expires_at: str | None = None
    last_used_at: str | None = None
    descriptions: dict[str, str] = {}


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


class FirstAnswer(Record, frozen=True):
    """What a caller was answered under an Idempotency-Key; `digest` is a sha256 of all that was asked."""

    caller: str
    key: str
    digest: str
    created_at: str
    status: int
    location: str | None
    body: str


class EventType(StrEnum):
    """Kinds of events, named as LXD names them (/1.0/events)."""

    OPERATION = "operation"
    LIFECYCLE = "lifecycle"


class Event(Record, frozen=True):
    """Something that happened, numbered without gaps in the order of the commits.

    `action` names it (`operation-updated`, `container-started`), `source` is the URL of what it is about, `container`
    and `node` say who may read it; `body` is the record, or the details, as plain values.
    """

    sequence: int
    at: str
    type: EventType
    action: str
    source: str
    container: str | None
    node: str | None
    body: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """What a committed transaction did to one record; `record` is None when it is gone, `new` when it was added.

    `before` is what it was, where what there is to tell depends on it.
    """

    kind: type[Record]
    key: str
    record: Record | None
    new: bool = False
    before: Record | None = None
