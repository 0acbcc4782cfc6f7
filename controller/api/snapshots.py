"""/1.0/vz/<id>/snapshots and /1.0/vz/<id>/snapshots/<name>."""

from __future__ import annotations

from controller.api.base import Handler
from controller.api.identity import Right
from controller.api.views import container_url, snapshot_view
from controller.services.requests import SnapshotBody


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
        self.answer_operation(await self.services.states.take_snapshot(self.known, container, body))


class Snapshot(Handler):
    """GET and DELETE."""

    rights = {"GET": Right.READ, "DELETE": Right.OPERATE}

    def get(self, container: str, name: str) -> None:
        self.services.states.require_snapshot(container, name)
        self.answer(snapshot_view(self.services.containers.get(container).snapshots[name]))

    async def delete(self, container: str, name: str) -> None:
        self.answer_operation(await self.services.states.delete_snapshot(self.known, container, name))


routes = [(r"/1\.0/vz/([^/]+)/snapshots", Snapshots), (r"/1\.0/vz/([^/]+)/snapshots/([^/]+)", Snapshot)]
