"""Recovering containers of fenced nodes: made anew elsewhere, under their id, hostname, configuration and address.

What the host that is off has on its disks is not there: a recovered container begins with what its source has.
"""

from __future__ import annotations

from typing import Any

import msgspec

from common.errors import InvalidRequest
from common.names import check_container_id, check_snapshot_name
from common.options import parse_config
from common.states import Status
from controller.live import LiveContainer
from controller.operations.recoveries import FROM_COPY, FROM_IMAGE, FromCopyParameters, FromImageParameters
from controller.placement import Placement
from controller.records import Container, Operation, Phase, Power
from controller.services.caller import Caller
from controller.services.containers import Containers, spec_of, wanted_of
from controller.services.fencing import require_fenced
from controller.services.image_sources import ImageSources
from controller.services.images import Resolved
from controller.services.requests import CopySource, ImageSource, RecoverBody
from controller.store import containers as rows
from controller.store import counters
from controller.store.db import Transaction


class Recovery:
    """Accepts recoveries."""

    def __init__(self, containers: Containers, images: ImageSources) -> None:
        self._containers = containers
        self._images = images

    async def recover(self, caller: Caller, container: str, body: RecoverBody) -> Operation:
        """Accept a recovery.

        Raises NotFound (container, image, source), Conflict (its node is not fenced), InvalidRequest (no source is
        known), Busy, NoPlacement, Unavailable (the node named, or the source's).
        """
        if not body.recover:
            raise InvalidRequest("nothing to be done", field="recover", allowed="true")
        live = self._containers.get(container)
        await self._containers.store.read(lambda connection: require_fenced(Transaction(connection), live.record.node))
        self._containers.require_whole(live.record)
        if body.node is not None:
            self._containers.nodes.require_reachable(body.node)
        start = _was_running(live) if body.start is None else body.start
        if isinstance(body.source, CopySource):
            return await self._from_copy(caller, container, body, body.source, start)
        return await self._from_image(caller, container, body, self._image(caller, live.record, body), start)

    def _image(self, caller: Caller, record: Container, body: RecoverBody) -> Resolved | None:
        """The image of the body, else that of the container; None: an empty root."""
        if isinstance(body.source, ImageSource):
            return self._images.resolve(body.source, caller, body.node)
        if body.source is not None:
            return None
        if record.image is None:
            raise InvalidRequest(
                f"container {record.id} was not made from an image: say from what it is to be made anew",
                field="source",
                allowed="type image, copy or none",
            )
        return self._images.resolve(self._same_image(record.image), caller, body.node)

    def _same_image(self, image: dict[str, Any]) -> ImageSource:
        """The very image, while there is one with that fingerprint; else what was asked for then."""
        fingerprint, alias, server = image.get("fingerprint"), image.get("alias"), image.get("server")
        if fingerprint in self._containers.fleet.images:
            return ImageSource(fingerprint=fingerprint)
        if alias is not None:
            return ImageSource(alias=alias, server=server)
        got = ("fingerprint",) if server is None else ("fingerprint", "server", "serial")
        properties = {key: value for key, value in image.items() if key not in got}
        if properties:
            return ImageSource(properties=properties, server=server)
        return ImageSource(fingerprint=fingerprint, server=server)

    # ------------------------------------------------------------ accepting

    async def _from_image(
        self, caller: Caller, container: str, body: RecoverBody, image: Resolved | None, start: bool
    ) -> Operation:
        def prepare(transaction: Transaction) -> Operation:
            old, fenced_at = _old(transaction, container)
            chosen = self._choose(transaction, old, body.node, image.architecture if image else None)
            new = self._renew(transaction, old, chosen, _shown(image, None if body.source is not None else old.image))
            parameters = FromImageParameters(
                spec=spec_of(new),
                node=new.node,
                fingerprint=image.fingerprint if image else None,
                source=image.source if image else None,
                properties=image.properties if image else {},
                start=start,
                remote=image.remote if image else None,
                old=old,
                fenced_at=fenced_at,
            )
            return self._write(transaction, caller, FROM_IMAGE.name, new, chosen, parameters)

        return await self._containers.operations.accept(prepare)

    async def _from_copy(
        self, caller: Caller, container: str, body: RecoverBody, source: CopySource, start: bool
    ) -> Operation:
        name, _, snapshot = source.source.partition("/")
        check_container_id(name, "source.source")
        if snapshot:
            check_snapshot_name(snapshot, "source.source")
        if source.refresh:
            raise InvalidRequest("there is nothing to refresh", field="source.refresh", allowed="false")
        if name == container:
            raise InvalidRequest(
                "its own files are on the host that is off", field="source.source", allowed="another container"
            )
        original = self._containers.require_source(name, snapshot)
        self._containers.nodes.require_reachable(original.record.node)

        def prepare(transaction: Transaction) -> Operation:
            old, fenced_at = _old(transaction, container)
            held = rows.require_ready(transaction, name)
            chosen = self._choose(transaction, old, body.node, self._containers.architecture(held.node))
            new = self._renew(transaction, old, chosen, held.image)
            parameters = FromCopyParameters(
                spec=spec_of(new),
                node=new.node,
                source=spec_of(held),
                source_node=held.node,
                snapshot=snapshot or None,
                start=start,
                rate=self._containers.nodes.transfer_bandwidth,
                old=old,
                fenced_at=fenced_at,
            )
            operation = self._write(transaction, caller, FROM_COPY.name, new, chosen, parameters, name)
            rows.rows.replace(transaction, msgspec.structs.replace(held, operation=operation.id))
            return operation

        return await self._containers.operations.accept(prepare)

    def _choose(
        self, transaction: Transaction, old: Container, node: str | None, architecture: str | None
    ) -> Placement:
        wanted = wanted_of(parse_config(old.config), node, architecture)
        return self._containers.choose(transaction, wanted, old.hostname, old.id)

    def _renew(
        self, transaction: Transaction, old: Container, chosen: Placement, image: dict[str, Any] | None
    ) -> Container:
        """Its row as of a later generation on its new node."""
        node = chosen.node or ""
        memory, disk = self._containers.reservation(old.config, node)
        return msgspec.structs.replace(
            old,
            node=node,
            generation=counters.advance(transaction, "generation"),
            image=image,
            phase=Phase.CREATING,
            error=None,
            reserved_memory=memory,
            reserved_disk=disk,
        )

    def _write(
        self,
        transaction: Transaction,
        caller: Caller,
        kind: str,
        new: Container,
        chosen: Placement,
        parameters: FromImageParameters | FromCopyParameters,
        *sources: str,
    ) -> Operation:
        old = parameters.old
        operation = self._containers.operations.draft(
            caller,
            kind,
            containers=(new.id, *sources),
            node=new.node,
            parameters=parameters,
            metadata={
                "placement": chosen.reasons,
                "recovered_from": old.node,
                "warning": f"made anew from its source: its files and snapshots on {old.node} are not in it",
            },
        )
        rows.rows.replace(transaction, msgspec.structs.replace(new, operation=operation.id))
        return operation


def _old(transaction: Transaction, container: str) -> tuple[Container, str]:
    """The row of a container whose node is fenced now, and since when."""
    old = rows.require_ready(transaction, container)
    node = require_fenced(transaction, old.node)
    return old, node.fenced_at or ""


def _was_running(live: LiveContainer) -> bool:
    """Whether it was left running, or, where no operation has decided that, was last seen so."""
    if live.record.power is not None:
        return live.record.power is not Power.STOPPED
    return live.report is not None and live.report.status in (Status.RUNNING, Status.FROZEN)


def _shown(image: Resolved | None, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """The container's `image`: what was asked for, now or before, and what it gets as far as that is known."""
    if image is None:
        return None
    got = {"fingerprint": image.fingerprint} if image.fingerprint is not None else {}
    return {**(image.requested if before is None else before), **got}
