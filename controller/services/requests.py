"""The bodies of requests, typed. They validate what comes in and describe it in the API's documents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Text = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(max_length=128)]
Config = dict[Name, Text]


class Body(Struct, frozen=True, forbid_unknown_fields=True):
    """A request's body; an unknown field is an error."""


class ImageSource(Body, frozen=True, tag_field="type", tag="image"):
    """A container from an image, found by exactly one of properties, alias and fingerprint."""

    properties: dict[Name, Name] | None = None
    alias: Name | None = None
    fingerprint: Annotated[str, Meta(max_length=64)] | None = None


class CopySource(Body, frozen=True, tag_field="type", tag="copy"):
    """A copy of a container, or of one of its snapshots (`container/snapshot`), on any node."""

    source: Annotated[str, Meta(max_length=129)]


class MigrationSource(Body, frozen=True, tag_field="type", tag="migration"):
    """An existing container moved to another node, or renamed by moving it to another id."""

    source: Name


class NoSource(Body, frozen=True, tag_field="type", tag="none"):
    """An empty root, to be filled."""


class AdoptSource(Body, frozen=True, tag_field="type", tag="adopt"):
    """What `node` has under this id, and nobody manages."""


Source = ImageSource | CopySource | MigrationSource | NoSource | AdoptSource


class CreateBody(Body, frozen=True):
    """POST /1.0/vz/<id>: a new container. Without a hostname it is called by its id."""

    source: Source
    hostname: Text | None = None
    config: Config | None = None
    description: Text | None = None
    node: Name | None = None
    start: bool = False


class CreateWithIdBody(CreateBody, frozen=True):
    """POST /1.0/vz: a new container, whose id may be left to the controller."""

    id: Name | None = None


class RenameBody(Body, frozen=True):
    """POST /1.0/vz/<id> without a source: another hostname or id, or a move to another node."""

    hostname: Text | None = None
    name: Name | None = None
    migration: bool = False
    node: Name | None = None


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
    """POST /1.0/vz/<id>/snapshots. Without a name it is called snap0, snap1 and so on."""

    name: Name | None = None


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
