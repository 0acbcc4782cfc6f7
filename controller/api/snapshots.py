"""/1.0/vz/<id>/snapshots and /1.0/vz/<id>/snapshots/<name>."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from common.errors import InvalidRequest
from controller.api.base import Handler
from controller.api.identity import Right
from controller.api.views import container_url, snapshot_view
from controller.services.requests import SnapshotBody, SnapshotRenameBody, SnapshotUpdateBody
from controller.services.snapshots import etag_of


class Snapshots(Handler):
    """GET and POST."""

    rights = {"GET": Right.READ, "POST": Right.OPERATE}
    parameters = ("recursion",)

    def get(self, container: str) -> None:
        snapshots = sorted(
            self.services.containers.get(container).snapshots.values(), key=lambda row: (row.created_at, row.name)
        )
        if self.recursion() == 0:
            self.answer([f"{container_url(container)}/snapshots/{snapshot.name}" for snapshot in snapshots])
        else:
            self.answer([snapshot_view(snapshot) for snapshot in snapshots])

    async def post(self, container: str) -> None:
        body = self.body(SnapshotBody)
        self.answer_operation(await self.services.snapshots.take(self.known, container, body))


class Snapshot(Handler):
    """GET, PUT and PATCH (its expiry), POST (its name), DELETE."""

    rights = {
        "GET": Right.READ,
        "PUT": Right.OPERATE,
        "PATCH": Right.OPERATE,
        "POST": Right.OPERATE,
        "DELETE": Right.OPERATE,
    }

    def get(self, container: str, name: str) -> None:
        snapshot = self.services.snapshots.require(container, name)
        self.set_header("ETag", f'"{etag_of(snapshot)}"')
        self.answer(snapshot_view(snapshot))

    async def put(self, container: str, name: str) -> None:
        body, expected = self.body(SnapshotUpdateBody), self.request.headers.get("If-Match")
        self._refuse_read_only(body, snapshot_view(self.services.snapshots.require(container, name)))
        accepted = self.services.snapshots.update(self.known, container, name, body, expected)
        self.answer_operation(await accepted)

    patch = put

    @staticmethod
    def _refuse_read_only(body: SnapshotUpdateBody, shown: dict[str, Any]) -> None:
        """What cannot be written is ignored where it is as GET gives it, and refused where it differs."""
        for field in shown.keys() - {"expires_at"}:
            given = getattr(body, field)
            if given is not UNSET and given != shown[field]:
                raise InvalidRequest(f"{field} cannot be changed so", field=field, allowed=f"{shown[field]!r}")

    async def post(self, container: str, name: str) -> None:
        body = self.body(SnapshotRenameBody)
        self.answer_operation(await self.services.snapshots.rename(self.known, container, name, body))

    async def delete(self, container: str, name: str) -> None:
        self.answer_operation(await self.services.snapshots.delete(self.known, container, name))


routes = [(r"/1\.0/vz/([^/]+)/snapshots", Snapshots), (r"/1\.0/vz/([^/]+)/snapshots/([^/]+)", Snapshot)]
