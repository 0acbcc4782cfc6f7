"""/1.0/vz/<id>/state."""

from __future__ import annotations

from controller.api.base import Handler
from controller.api.identity import Right
from controller.api.views import rendered
from controller.services.requests import StateBody


class State(Handler):
    """GET and PUT /1.0/vz/<id>/state."""

    rights = {"GET": Right.READ, "PUT": Right.OPERATE}

    def get(self, container: str) -> None:
        live = self.services.containers.get(container)
        self.answer_bytes(rendered(self.services.fleet, live, "state"))

    async def put(self, container: str) -> None:
        body = self.body(StateBody)
        self.answer_operation(await self.services.states.change(self.known, container, body))


routes = [(r"/1\.0/vz/([^/]+)/state", State)]
