"""/1.0/nodes, /1.0/nodes/<name>, and joining: /1.0/agents."""

from __future__ import annotations

from controller.api.base import Handler
from controller.api.identity import Right
from controller.api.views import node_view
from controller.services.requests import JoinBody, NodeBody


class Nodes(Handler):
    """GET, and POST, which gives a one-time join token."""

    rights = {"GET": Right.READ, "POST": Right.ADMIN}
    parameters = ("recursion",)

    def get(self) -> None:
        fleet = self.services.fleet
        if self.recursion() == 0:
            self.answer([f"/1.0/nodes/{name}" for name in sorted(fleet.nodes)])
        else:
            self.answer([node_view(fleet, node) for _, node in sorted(fleet.nodes.items())])

    async def post(self) -> None:
        body = self.body(NodeBody)
        await self.answer_write(await self.services.enrolment.invite(body.name), secret=True)


class Node(Handler):
    """GET, and DELETE of a node without containers."""

    rights = {"GET": Right.READ, "DELETE": Right.ADMIN}

    def get(self, name: str) -> None:
        self.answer(node_view(self.services.fleet, self.services.nodes.require(name, "name")))

    async def delete(self, name: str) -> None:
        await self.services.enrolment.remove(name)
        await self.answer_write({})


class Agents(Handler):
    """POST: a host joins. Its one-time token is the credential."""

    rights = {"POST": Right.PUBLIC}

    async def post(self) -> None:
        body = self.body(JoinBody)
        self.answer({"node": await self.services.enrolment.join(body)})


routes = [(r"/1\.0/nodes", Nodes), (r"/1\.0/nodes/([^/]+)", Node), (r"/1\.0/agents", Agents)]
