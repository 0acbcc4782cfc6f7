"""/1.0/nodes, /1.0/nodes/<name>, and joining: /1.0/agents."""

from __future__ import annotations

from common.errors import InvalidRequest
from controller.api.base import Handler
from controller.api.identity import Right
from controller.api.views import node_view
from controller.records import Operation
from controller.services.requests import JoinBody, NodeBody, NodeStateBody


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
    """GET, and DELETE of a node without containers, or with `force=1` of a fenced one with all it had."""

    rights = {"GET": Right.READ, "DELETE": Right.ADMIN}
    parameters = ("force",)

    def get(self, name: str) -> None:
        self.answer(node_view(self.services.fleet, self.services.nodes.require(name, "name")))

    async def delete(self, name: str) -> None:
        await self.services.enrolment.remove(name, self.flag_parameter("force"))
        await self.answer_write({})


class NodeState(Handler):
    """POST: drain, restore or fence a node."""

    rights = {"POST": Right.ADMIN}
    # Fencing a node ends the wait for its inventory, and a preview does nothing; the others are refused below.
    while_reconciling = True

    async def post(self, name: str) -> None:
        body = self.body(NodeStateBody)
        _check_mode(body)
        if body.action == "fence":
            await self.answer_write(await self.services.fencing.fence(self.known, name, body))
            return
        if not body.preview:
            self.services.reconciliation.check()
        drains = self.services.drains
        answer = await (drains.restore if body.action == "restore" else drains.drain)(self.known, name, body)
        if isinstance(answer, Operation):
            self.answer_operation(answer)
        else:
            self.answer(answer)


def _check_mode(body: NodeStateBody) -> None:
    """Raise InvalidRequest for a mode of another action."""
    allowed = {"drain": ("move", "migrate", "stop"), "restore": ("skip",), "fence": ()}
    modes = allowed["drain" if body.action == "evacuate" else body.action]
    if body.mode is not None and body.mode not in modes:
        raise InvalidRequest(f"{body.action} has no mode {body.mode}", field="mode", allowed=", ".join(modes) or "none")


class Agents(Handler):
    """POST: a host joins. Its one-time token is the credential."""

    rights = {"POST": Right.PUBLIC}

    async def post(self) -> None:
        body = self.body(JoinBody)
        self.answer({"node": await self.services.enrolment.join(body)})


routes = [
    (r"/1\.0/nodes", Nodes),
    (r"/1\.0/nodes/([^/]+)", Node),
    (r"/1\.0/nodes/([^/]+)/state", NodeState),
    (r"/1\.0/agents", Agents),
]
