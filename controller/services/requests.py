"""The bodies of requests, typed. They validate what comes in and describe it in the API's documents."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Text = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(max_length=128)]
Config = dict[Name, Text]
StopTimeout = Annotated[float, Meta(ge=-1, le=3600)]
"""Seconds for a graceful stop."""
Moment = Annotated[datetime, Meta(tz=True)]


class Body(Struct, frozen=True, forbid_unknown_fields=True):
    """A request's body; an unknown field is an error."""


class ImageSource(Body, frozen=True, tag_field="type", tag="image"):
    """A container from an image, found by exactly one of properties, alias and fingerprint.

    `server` is an image server: the name of one that is configured, or its https URL.
    """

    properties: dict[Name, Name] | None = None
    alias: Name | None = None
    fingerprint: Annotated[str, Meta(max_length=64)] | None = None
    server: Annotated[str, Meta(min_length=1, max_length=2048)] | None = None
    protocol: Literal["simplestreams"] | None = None
    mode: Literal["pull"] | None = None


class CopySource(Body, frozen=True, tag_field="type", tag="copy"):
    """A copy of a container, or of one of its snapshots (`container/snapshot`), on any node.

    `refresh`: the copy exists, and gets the files of the source.
    """

    source: Annotated[str, Meta(max_length=129)]
    refresh: bool = False


class MigrationSource(Body, frozen=True, tag_field="type", tag="migration"):
    """An existing container moved to another node, or renamed by moving it to another id."""

    source: Name


class NoSource(Body, frozen=True, tag_field="type", tag="none"):
    """An empty root, to be filled."""


class AdoptSource(Body, frozen=True, tag_field="type", tag="adopt"):
    """What `node` has under this id, and nobody manages."""


Source = ImageSource | CopySource | MigrationSource | NoSource | AdoptSource


class CreateBody(Body, frozen=True):
    """POST /1.0/vz/<id>: a new container. Without a hostname it is called by its id.

    `bandwidth` (bytes per second, `"50MB"`) is for a copy and a migration; `timeout` and `force` as in RenameBody.
    """

    source: Source
    hostname: Text | None = None
    config: Config | None = None
    description: Text | None = None
    node: Name | None = None
    start: bool = False
    bandwidth: Name | None = None
    timeout: StopTimeout | None = None
    force: bool = False


class CreateWithIdBody(CreateBody, frozen=True):
    """POST /1.0/vz: a new container, whose id may be left to the controller."""

    id: Name | None = None


class RenameBody(Body, frozen=True):
    """POST /1.0/vz/<id> without a source: another hostname or id, or a move to another node.

    For a move: `bandwidth` (bytes per second, `"50MB"`), `timeout` in seconds for its own shutdown before it is killed
    (-1 means the longest), `force` kills it at once.
    """

    hostname: Text | None = None
    name: Name | None = None
    migration: bool = False
    node: Name | None = None
    bandwidth: Name | None = None
    timeout: StopTimeout | None = None
    force: bool = False


class RecoverBody(Body, frozen=True):
    """POST /1.0/vz/<id> with `recover`: made anew elsewhere, since its node is fenced.

    Without a source from the image that it was created from; without `start` it runs when it last did.
    """

    recover: bool
    source: ImageSource | CopySource | NoSource | None = None
    node: Name | None = None
    start: bool | None = None


class UpdateBody(Body, frozen=True):
    """PUT /1.0/vz/<id>: what GET gave, changed.

    `status` and `drift` are ignored; what cannot be written must be as GET gives it.
    """

    config: Config
    hostname: Text | UnsetType = UNSET
    description: Text | UnsetType = UNSET
    status: Any = UNSET
    drift: Any = UNSET
    id: Any = UNSET
    node: Any = UNSET
    created_at: Any = UNSET
    image: Any = UNSET


class RestoreBody(Body, frozen=True):
    """PUT /1.0/vz/<id>: put its files back to what a snapshot holds."""

    restore: Annotated[str, Meta(max_length=129)]


class StateBody(Body, frozen=True):
    """PUT /1.0/vz/<id>/state. `timeout` in seconds for a graceful stop; -1 means the longest."""

    action: Literal["start", "stop", "restart", "freeze", "unfreeze"]
    timeout: Annotated[float, Meta(ge=-1, le=3600)] = 30
    force: bool = False


class SnapshotBody(Body, frozen=True):
    """POST /1.0/vz/<id>/snapshots. Without a name it is called by the container's snapshots.pattern.

    Without `expires_at` snapshots.expiry says when it expires; 0001-01-01T00:00:00Z means never (LXD's spelling).
    """

    name: Name | None = None
    expires_at: Moment | None = None
    stateful: bool = False


class SnapshotUpdateBody(Body, frozen=True):
    """PUT and PATCH /1.0/vz/<id>/snapshots/<name>: what GET gave, with another `expires_at` (null: never)."""

    expires_at: Moment | UnsetType | None = UNSET
    name: Any = UNSET
    container: Any = UNSET
    created_at: Any = UNSET
    config: Any = UNSET
    scheduled: Any = UNSET
    stateful: Any = UNSET


class SnapshotRenameBody(Body, frozen=True):
    """POST /1.0/vz/<id>/snapshots/<name>: another name."""

    name: Name


class NodeBody(Body, frozen=True):
    """POST /1.0/nodes: a one-time token by which a host joins; with a name, only under that name."""

    name: Name | None = None


class NodeStateBody(Body, frozen=True):
    """POST /1.0/nodes/<name>/state. `evacuate` and `migrate` are LXD's words for `drain` and `move`.

    A drain moves containers away, or stops them where they are (`timeout` in seconds, -1 means the longest; `force`);
    a restore takes that back, unless it is to `skip` that. A fence needs a confirmation.
    """

    action: Literal["drain", "evacuate", "restore", "fence"]
    mode: Literal["move", "migrate", "stop", "skip"] | None = None
    timeout: Annotated[float, Meta(ge=-1, le=3600)] = 30
    force: bool = False
    preview: bool = False
    confirm: Name | None = None
    i_confirm_node_is_off: bool = False


class JoinBody(Body, frozen=True):
    """POST /1.0/agents: a host joins, with the secret of its token and its CURVE public key (Z85)."""

    secret: Annotated[str, Meta(max_length=128)]
    public_key: Annotated[str, Meta(min_length=40, max_length=40)]
    node: Name | None = None


class PlacementBody(Body, frozen=True):
    """POST /1.0/placement: where a container with this configuration would go."""

    config: Config | None = None
    node: Name | None = None
    architecture: Name | None = None
    hostname: Text | None = None


class AliasBody(Body, frozen=True):
    """POST /1.0/images/aliases. `target` is an image's fingerprint, or a unique prefix of it."""

    name: Name
    target: Annotated[str, Meta(max_length=64)]
    description: Text = ""
    type: Literal["", "container"] = ""


class AliasChangeBody(Body, frozen=True):
    """PUT and PATCH /1.0/images/aliases/<name>: what GET gave, changed; `name` and `type` cannot be."""

    target: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    description: Text | UnsetType = UNSET
    name: Any = UNSET
    type: Any = UNSET


class AliasNameBody(Body, frozen=True):
    """POST /1.0/images/aliases/<name>: another name for the alias."""

    name: Name


class _ImageAsShown(Body, frozen=True, kw_only=True):
    """What GET gives of an image and cannot be written."""

    aliases: Any = UNSET
    architecture: Any = UNSET
    cached: Any = UNSET
    created_at: Any = UNSET
    filename: Any = UNSET
    fingerprint: Any = UNSET
    last_used_at: Any = UNSET
    layout: Any = UNSET
    profiles: Any = UNSET
    size: Any = UNSET
    source: Any = UNSET
    type: Any = UNSET
    update_source: Any = UNSET
    uploaded_at: Any = UNSET


class ImageUpdateBody(_ImageAsShown, frozen=True, kw_only=True):
    """PUT /1.0/images/<fingerprint>: what GET gave, changed. 0001-01-01T00:00:00Z means never (LXD's spelling)."""

    properties: dict[Name, Text]
    public: bool = False
    auto_update: bool = False
    expires_at: Moment | None = None


class ImageChangeBody(_ImageAsShown, frozen=True, kw_only=True):
    """PATCH /1.0/images/<fingerprint>: what is to change. A property that is null is removed."""

    properties: dict[Name, Text | None] | UnsetType = UNSET
    public: bool | UnsetType = UNSET
    auto_update: bool | UnsetType = UNSET
    expires_at: Moment | UnsetType | None = UNSET
