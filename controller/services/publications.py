"""Accepting that a container, or its snapshot, is published as an image."""

from __future__ import annotations

import msgspec

from common.commands import COMPRESSION_ALGORITHMS
from common.errors import Conflict, InvalidRequest, NotFound
from common.names import check_container_id, check_snapshot_name
from common.states import Status
from controller.operations.image_publishing import PublishParameters
from controller.records import Operation
from controller.services.caller import Caller
from controller.services.containers import Containers
from controller.services.image_bodies import ImageBody
from controller.services.image_pulls import ImagePulls
from controller.store import containers as rows
from controller.store.db import Transaction

TYPES = ("container", "instance", "snapshot")
"""What `source.type` may be; a snapshot's name is `CONTAINER/SNAPSHOT`."""
ENDINGS = {"none": "", "gzip": ".gz", "zstd": ".zst", "xz": ".xz"}
NAME = "source.name"


class Publications:
    """Accepts publications."""

    def __init__(self, containers: Containers, pulls: ImagePulls) -> None:
        self._containers = containers
        self._pulls = pulls

    async def publish(self, caller: Caller, body: ImageBody) -> Operation:
        """Accept a publication; nothing else works on the container meanwhile.

        Raises InvalidRequest, NotFound, Conflict (it runs, and no `force`; or an alias), Busy, Unavailable (its node).
        """
        container, snapshot = _named(body)
        compression = body.compression_algorithm or "gzip"
        if compression not in COMPRESSION_ALGORITHMS:
            raise InvalidRequest(
                f"unknown compression {compression[:40]!r}",
                field="compression_algorithm",
                allowed=", ".join(COMPRESSION_ALGORITHMS),
            )
        if body.auto_update:
            raise InvalidRequest("a container's image has no newer versions", field="auto_update", allowed="false")
        keep = self._pulls.keep(body)
        if not keep.filename:
            keep = msgspec.structs.replace(keep, filename=f"{container}.tar{ENDINGS[compression]}")
        self._check_source(container, snapshot, body.force)

        def prepare(transaction: Transaction) -> Operation:
            record = rows.require_ready(transaction, container)
            names = {each.name for each in rows.all_snapshots(transaction.connection, container)}
            if snapshot is not None and snapshot not in names:
                raise _missing(container, snapshot)
            parameters = PublishParameters(
                container,
                record.node,
                record.generation,
                snapshot,
                body.force,
                compression,
                self._containers.architecture(record.node) or "",
                keep,
            )
            operation = self._containers.operations.draft(
                caller,
                "image.publish",
                containers=(container,),
                node=record.node,
                parameters=parameters,
                resources={"containers": [f"/1.0/vz/{container}"], "images": []},
            )
            rows.rows.replace(transaction, msgspec.structs.replace(record, operation=operation.id))
            return operation

        return await self._containers.operations.accept(prepare)

    def _check_source(self, container: str, snapshot: str | None, force: bool) -> None:
        live = self._containers.get(container, NAME)
        self._containers.require_whole(live.record)
        self._containers.nodes.require_reachable(live.record.node)
        if snapshot is not None:
            if snapshot not in live.snapshots:
                raise _missing(container, snapshot)
        elif not force and self._containers.fleet.status_of(live).status in (Status.RUNNING, Status.FROZEN):
            raise Conflict(
                f"container {container} is running", field="force", allowed="a stopped container, a snapshot, or force"
            )


def _named(body: ImageBody) -> tuple[str, str | None]:
    """The container and, if one is meant, its snapshot. Raises InvalidRequest."""
    container, slash, snapshot = body.source.name.partition("/")
    if bool(slash) is not (body.source.type == "snapshot"):
        allowed = "CONTAINER/SNAPSHOT" if body.source.type == "snapshot" else "a container's id"
        raise InvalidRequest(f"invalid name {body.source.name!r}", field=NAME, allowed=allowed)
    check_container_id(container, NAME)
    return container, check_snapshot_name(snapshot, NAME) if slash else None


def _missing(container: str, snapshot: str) -> NotFound:
    return NotFound(f"container {container} has no snapshot {snapshot}", field=NAME)
