"""Creating, changing, renaming and deleting containers."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from common.commands import (
    CreateContainer,
    DeleteContainer,
    EnsureImage,
    RenameContainer,
    StartContainer,
    UpdateContainer,
)
from common.errors import Conflict, NotFound, Stale
from common.options import parse_config
from common.reports import ContainerSpec, ImageSpec
from controller.images.servers import RemoteSource
from controller.images.simplestreams import canonical
from controller.operations.kinds import Context, Kind, Step
from controller.operations.power import started
from controller.records import Operation, Phase
from controller.store import containers as rows
from controller.store.db import Transaction
from controller.store.images import note_use


class CreateParameters(Struct, frozen=True, kw_only=True):
    """A creation: from a stored image (`fingerprint`), a builder's key (`source`), of a server, or an empty root."""

    spec: ContainerSpec
    node: str
    fingerprint: str | None
    source: str | None
    properties: dict[str, str]
    start: bool
    remote: RemoteSource | None = None


class ChangeParameters(Struct, frozen=True):
    """A change of configuration, hostname or id; what it reserves on its node before and after, in bytes."""

    node: str
    old: ContainerSpec
    new: ContainerSpec
    description: str
    old_reserved: tuple[int, int]
    new_reserved: tuple[int, int]


class DeleteParameters(Struct, frozen=True):
    """A deletion. `row_only`: the node is out of reach, and what it may have of a failed creation stays there."""

    container: str
    node: str
    generation: int
    force: bool
    row_only: bool = False


# ---------------------------------------------------------------- create


async def _obtain_image(context: Context) -> dict[str, Any] | None:
    wanted = context.parameters(CreateParameters)
    if wanted.remote is not None:
        return await _obtain_remote(context, wanted.remote, wanted.node)
    if wanted.fingerprint is not None or wanted.source is None:
        return None
    image = await context.resources.images.obtain(wanted.source, wanted.properties, context.report)
    return {"fingerprint": image.fingerprint}


async def _obtain_remote(context: Context, remote: RemoteSource, node: str) -> dict[str, Any]:
    got = await context.remote_images.obtain(remote, context.show)
    live = context.resources.fleet.nodes.get(node)
    facts = live.record.facts if live is not None else None
    architecture = canonical(got.image.properties.get("architecture", ""))
    if facts is not None and architecture not in ("", facts.architecture):
        raise Conflict(
            f"the image is for {architecture}, and node {node} is {facts.architecture}", field="source.fingerprint"
        )
    return {"fingerprint": got.image.fingerprint} | ({"serial": got.serial} if got.serial else {})


def _fingerprint(context: Context) -> str | None:
    wanted = context.parameters(CreateParameters)
    return wanted.fingerprint or context.operation.outputs.get("image", {}).get("fingerprint")


async def _distribute_image(context: Context) -> None:
    wanted = context.parameters(CreateParameters)
    fingerprint = _fingerprint(context)
    if fingerprint is None:
        return
    node = context.resources.fleet.nodes.get(wanted.node)
    privileged = parse_config(wanted.spec.config).privileged
    if not privileged and node is not None and (node.images or {}).get(fingerprint):
        return
    await _ensure_image(context, wanted.node, fingerprint, privileged)


async def _ensure_image(context: Context, node: str, fingerprint: str, privileged: bool) -> None:
    image = context.resources.fleet.images.get(fingerprint)
    if image is None:
        raise NotFound(f"image {fingerprint[:12]} was deleted meanwhile", field="source")
    ticket = context.resources.images.ticket(fingerprint, context.operation.id)
    path = f"/1.0/internal/images/{fingerprint}"
    spec = ImageSpec(fingerprint, image.layout, image.size, path, ticket, image.rootfs_offset)
    await context.command(node, EnsureImage(spec, privileged), generation=0)
    live = context.resources.fleet.nodes.get(node)
    if live is not None and live.images is not None:
        live.images[fingerprint] = live.images.get(fingerprint, False) or not privileged


async def _create(context: Context) -> None:
    wanted = context.parameters(CreateParameters)
    arguments = CreateContainer(wanted.spec, _fingerprint(context))
    await context.command(wanted.node, arguments, wanted.spec.generation)


async def _delete_created(context: Context) -> None:
    wanted = context.parameters(CreateParameters)
    if not context.refused:
        await context.command(
            wanted.node, DeleteContainer(wanted.spec.id, wanted.spec.generation, force=True), wanted.spec.generation
        )


async def _start_created(context: Context) -> None:
    wanted = context.parameters(CreateParameters)
    if wanted.start:
        await context.command(wanted.node, StartContainer(wanted.spec.id), wanted.spec.generation)


def _created(transaction: Transaction, operation: Operation) -> None:
    record = rows.require(transaction, operation.containers[0])
    got = operation.outputs.get("image", {})
    image = record.image
    if got and image is not None:
        image = {**image, **got}
    note_use(transaction, (image or {}).get("fingerprint"), operation.updated_at)
    power = started(operation.parameters["start"])
    ready = msgspec.structs.replace(record, phase=Phase.READY, operation=None, image=image, error=None, power=power)
    rows.rows.replace(transaction, ready)


def creation_failed(transaction: Transaction, operation: Operation) -> None:
    """The container stays as Error with the reason, until it is deleted or a new POST replaces it; it holds nothing."""
    record = rows.rows.get(transaction.connection, operation.containers[0])
    reason = operation.error.text if operation.error else "unknown"
    if record is not None and record.operation == operation.id:
        failed = msgspec.structs.replace(
            record, phase=Phase.FAILED, error=f"creation failed: {reason}", reserved_memory=0, reserved_disk=0
        )
        rows.rows.replace(transaction, failed)
    rows.release(transaction, operation)


CREATE = Kind(
    name="container.create",
    description="Creating container",
    steps=(
        Step("image", _obtain_image),
        Step("distribute", _distribute_image),
        Step("create", _create, _delete_created),
        Step("start", _start_created),
    ),
    timeout=3600,
    succeeded=_created,
    failed=creation_failed,
)


# ---------------------------------------------------------------- change


async def _update(context: Context) -> None:
    change = context.parameters(ChangeParameters)
    await context.command(change.node, UpdateContainer(change.new), change.new.generation)


async def _update_back(context: Context) -> None:
    change = context.parameters(ChangeParameters)
    await context.command(change.node, UpdateContainer(change.old), change.old.generation)


async def _rename(context: Context) -> None:
    change = context.parameters(ChangeParameters)
    await context.command(change.node, RenameContainer(change.old.id, change.new), change.new.generation)


async def _rename_back(context: Context) -> None:
    change = context.parameters(ChangeParameters)
    if not context.refused:
        await context.command(change.node, RenameContainer(change.new.id, change.old), change.old.generation)


def _changed(transaction: Transaction, operation: Operation) -> None:
    change = msgspec.convert(operation.parameters, ChangeParameters)
    record = rows.require(transaction, change.old.id)
    memory, disk = change.new_reserved
    after = msgspec.structs.replace(
        record,
        id=change.new.id,
        hostname=change.new.hostname,
        description=change.description,
        config=change.new.config,
        operation=None,
        reserved_memory=memory,
        reserved_disk=disk,
    )
    rows.change_id(transaction, change.old.id, after)


def _unchanged(transaction: Transaction, operation: Operation) -> None:
    change = msgspec.convert(operation.parameters, ChangeParameters)
    record = rows.require(transaction, change.old.id)
    memory, disk = change.old_reserved
    after = msgspec.structs.replace(record, operation=None, reserved_memory=memory, reserved_disk=disk)
    rows.rows.replace(transaction, after)


UPDATE = Kind(
    name="container.update",
    description="Updating container",
    steps=(Step("update", _update, _update_back),),
    timeout=120,
    succeeded=_changed,
    failed=_unchanged,
)

RENAME = Kind(
    name="container.rename",
    description="Renaming container",
    steps=(Step("rename", _rename, _rename_back),),
    timeout=120,
    succeeded=_changed,
    failed=_unchanged,
)


# ---------------------------------------------------------------- delete


async def _delete(context: Context) -> None:
    wanted = context.parameters(DeleteParameters)
    if wanted.row_only:
        return
    arguments = DeleteContainer(wanted.container, wanted.generation, wanted.force)
    try:
        await context.command(wanted.node, arguments, wanted.generation)
    except (Conflict, Stale) as error:
        # The node has another one under that id, which stays: this one is not there.
        if error.field != "generation":
            raise


def _deleted(transaction: Transaction, operation: Operation) -> None:
    rows.rows.delete(transaction, operation.containers[0])


DELETE = Kind(
    name="container.delete",
    description="Deleting container",
    # Files go one by one: a deletion that has begun cannot be taken back.
    steps=(Step("delete", _delete),),
    timeout=300,
    succeeded=_deleted,
    failed=rows.release,
    no_return=0,
)
