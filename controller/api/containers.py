"""/1.0/vz and /1.0/vz/<id>."""

from __future__ import annotations

from msgspec import UNSET

from common.errors import InvalidRequest
from common.names import check_container_id, check_node_name
from common.states import Status, status_named
from controller.api.base import Handler
from controller.api.identity import Right, authorize
from controller.api.views import container_url, rendered
from controller.deviations import drift_of
from controller.live import LiveContainer
from controller.services.changes import check_match, etag_of
from controller.services.requests import (
    AdoptSource,
    CopySource,
    CreateBody,
    CreateWithIdBody,
    MigrationSource,
    RecoverBody,
    RenameBody,
    RestoreBody,
    UpdateBody,
)

MAX_PAGE = 10_000


class Containers(Handler):
    """GET and POST /1.0/vz."""

    rights = {"GET": Right.READ, "POST": Right.OPERATE}
    parameters = ("recursion", "node", "status", "hostname", "drift", "limit", "cursor")

    def get(self) -> None:
        fleet = self.services.fleet
        if self.not_modified(f"{self.services.server.instance}-{fleet.revision}"):
            return
        found = self._page(self._filtered())
        if self.recursion() == 0:
            self.answer([container_url(live.record.id) for live in found])
        else:
            self.answer_bytes(b"[" + b",".join(rendered(fleet, live, "object") for live in found) + b"]")

    def _filtered(self) -> list[LiveContainer]:
        fleet = self.services.fleet
        node = self.get_query_argument("node", "")
        hostname = self.get_query_argument("hostname", "")
        status = self._status()
        drift = self.flag_parameter("drift") if self.get_query_argument("drift", "") else None
        if node:
            self.services.nodes.require(check_node_name(node))
        return [
            live
            for _, live in sorted(fleet.containers.items())
            if (not node or live.record.node == node)
            and (not hostname or live.record.hostname == hostname)
            and (status is None or fleet.status_of(live).status is status)
            and (drift is None or bool(drift_of(fleet, live)) is drift)
        ]

    def _status(self) -> Status | None:
        text = self.get_query_argument("status", "")
        if not text:
            return None
        status = status_named(text)
        if status is None:
            allowed = ", ".join(status.text for status in Status if not status.final)
            raise InvalidRequest(f"unknown status {text[:40]!r}", field="status", allowed=allowed)
        return status

    def _page(self, found: list[LiveContainer]) -> list[LiveContainer]:
        """What stands after `cursor` (an id), `limit` at most; X-Next-Cursor says where the next page begins."""
        limit = self.whole_parameter("limit", MAX_PAGE, 1, MAX_PAGE)
        cursor = self.get_query_argument("cursor", "")
        if cursor:
            check_container_id(cursor, "cursor")
            found = [live for live in found if live.record.id > cursor]
        if len(found) > limit:
            found = found[:limit]
            self.set_header("X-Next-Cursor", found[-1].record.id)
        return found

    async def post(self) -> None:
        body = self.body(CreateWithIdBody)
        await create(self, body.id, body)


async def create(handler: Handler, container: str | None, body: CreateBody) -> None:
    """Create from any source, or move, refresh or adopt when the source says so."""
    if isinstance(body.source, MigrationSource):
        if container is None:
            raise InvalidRequest("a move needs an id", field="id", allowed="the container's own, or a new one")
        operation = await handler.services.moves.migrate(handler.known, container, body, body.source)
    elif isinstance(body.source, CopySource) and body.source.refresh:
        operation = await handler.services.refreshes.refresh(handler.known, container, body, body.source)
    elif isinstance(body.source, AdoptSource):
        operation = await handler.services.adoptions.adopt(handler.known, container, body)
    else:
        operation = await handler.services.containers.create(handler.known, container, body)
    handler.answer_operation(operation)


class Container(Handler):
    """GET, POST, PUT and DELETE /1.0/vz/<id>."""

    rights = {"GET": Right.READ, "POST": Right.OPERATE, "PUT": Right.OPERATE, "DELETE": Right.OPERATE}
    parameters = ("recursion", "force")

    def get(self, container: str) -> None:
        live = self.services.containers.get(container)
        # Serves If-Match only: it does not change with the status, so it must never make a 304 of one.
        self.set_header("ETag", f'"{etag_of(live.record)}"')
        self.answer_bytes(rendered(self.services.fleet, live, "object"))

    async def post(self, container: str) -> None:
        check_container_id(container)
        if self.has_field("recover"):
            # It takes an operator's word that the host is off.
            authorize(self.caller, Right.ADMIN)
            self.answer_operation(await self.services.recovery.recover(self.known, container, self.body(RecoverBody)))
        elif self.has_field("source"):
            await create(self, container, self.body(CreateBody))
        else:
            body = self.body(RenameBody)
            accept = self.services.moves.move if body.migration else self.services.changes.rename
            self.answer_operation(await accept(self.known, container, body))

    async def put(self, container: str) -> None:
        expected = self.request.headers.get("If-Match")
        if self.has_field("restore"):
            restore = self.body(RestoreBody).restore
            check_match(self.services.containers.get(container).record, expected)
            self.answer_operation(await self.services.snapshots.restore(self.known, container, restore))
            return
        body = self.body(UpdateBody)
        live = self.services.containers.get(container)
        self._refuse_read_only(body, live)
        self.answer_operation(await self.services.changes.update(self.known, container, body, expected))

    def _refuse_read_only(self, body: UpdateBody, live: LiveContainer) -> None:
        """What cannot be written is ignored where it is as GET gives it, and refused where it differs."""
        record = live.record
        given = {"id": body.id, "node": body.node, "created_at": body.created_at, "image": body.image}
        shown = {"id": record.id, "node": record.node, "created_at": record.created_at, "image": record.image}
        for name, value in given.items():
            if value is not UNSET and value != shown[name]:
                raise InvalidRequest(f"{name} cannot be changed by PUT", field=name, allowed=f"{shown[name]!r}")

    async def delete(self, container: str) -> None:
        force = self.flag_parameter("force")
        self.answer_operation(await self.services.changes.delete(self.known, container, force))


routes = [(r"/1\.0/vz", Containers), (r"/1\.0/vz/([^/]+)", Container)]
