"""POST /1.0/placement: where a container would go and why, without doing anything."""

from __future__ import annotations

from common.names import check_hostname
from controller.api.base import Handler
from controller.api.identity import Right
from controller.services.requests import PlacementBody


class Placement(Handler):
    """POST."""

    rights = {"POST": Right.READ}
    while_reconciling = True  # it does nothing

    async def post(self) -> None:
        body = self.body(PlacementBody)
        if body.hostname is not None:
            check_hostname(body.hostname)
        chosen = await self.services.containers.place(body)
        self.answer({"node": chosen.node, "nodes": chosen.reasons})


routes = [(r"/1\.0/placement", Placement)]
