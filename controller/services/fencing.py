"""Fencing: an operator states that a host is off, so that its containers may be recovered elsewhere.

Nobody here can know it: a node that cannot be reached may run all its containers. When a fenced host comes back, what
was recovered elsewhere is stopped there before the node counts as reachable; it stays out of placement until it is
restored. The order of the transactions decides: what was recovered before the return is stopped, and after it nothing
is recovered any more.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

import msgspec

from common.clock import Clock, timestamp
from common.commands import StopContainer
from common.errors import Conflict, InvalidRequest, NotFound, VzfleetError
from common.messages import Hello, Inventory, Samples, StateChanged
from common.reports import ContainerReport
from common.states import NodeStatus, Status
from common.tasks import Tasks
from controller.dispatch.dispatcher import Dispatcher
from controller.dispatch.listener import LinkListener
from controller.fleet import Fleet
from controller.live import LiveContainer, LiveNode
from controller.records import Node, NodeMode, Operation
from controller.services.caller import Caller
from controller.services.nodes import startable
from controller.services.requests import NodeStateBody
from controller.store import containers as container_rows
from controller.store import nodes as rows
from controller.store import operations as operation_rows
from controller.store.db import Database, Transaction

log = logging.getLogger(__name__)
STOP_TIME = 60.0
"""Seconds that a node has to stop a container which runs elsewhere."""
RECOVER = 'POST /1.0/vz/<id> with {"recover": true}'


class Fencing:
    """Fences nodes. Stands between the link and `listener`, which hears everything as it would without."""

    dispatcher: Dispatcher

    def __init__(self, listener: LinkListener, store: Database, fleet: Fleet, clock: Clock) -> None:
        self._listener = listener
        self._store = store
        self._fleet = fleet
        self._clock = clock
        self._tasks = Tasks("fencing")
        self._stopping: dict[tuple[str, str], ContainerReport] = {}
        """By (node, container): what was told last of a stray that is being stopped. One stop at a time."""

    def begin(self, dispatcher: Dispatcher) -> None:
        """Use this dispatcher, which has the nodes enrolled; those that are fenced get no commands."""
        self.dispatcher = dispatcher
        for name, node in self._fleet.nodes.items():
            if node.record.mode is NodeMode.FENCED:
                dispatcher.fence(name, f"node {name} was {node.fence}")

    async def close(self) -> None:
        """End what is under way."""
        await self._tasks.close()

    # ------------------------------------------------------------ an operator's statement

    async def fence(self, caller: Caller, name: str, body: NodeStateBody) -> dict[str, Any]:
        """Take an operator's word that the host is off; returns what follows from it.

        Raises NotFound, InvalidRequest without a confirmation, Conflict while an agent of the node is connected.
        """
        self._refuse_connected(name)
        if body.preview:
            return await self._store.read(lambda connection: self._consequences(Transaction(connection), name))
        if not body.i_confirm_node_is_off and body.confirm != name:
            raise InvalidRequest(
                f"make sure that the host of node {name} is off and stays off, then say so: what still runs there "
                "would run twice",
                field="confirm",
                allowed=f"{name!r}, or i_confirm_node_is_off: true",
            )

        def write(transaction: Transaction) -> dict[str, Any]:
            self._refuse_connected(name)
            record = rows.require(transaction, name)
            if record.mode is not NodeMode.FENCED:
                now = timestamp(self._clock.now())
                fenced = msgspec.structs.replace(record, mode=NodeMode.FENCED, fenced_at=now, fenced_by=caller.name)
                rows.rows.replace(transaction, fenced)
            return self._consequences(transaction, name)

        answer = await self._store.write(write)
        reason = f"node {name} was {self._fleet.nodes[name].fence}"
        log.warning("a node is fenced", extra={"node": name, "reason": reason})
        # Should an agent have come in between, it has to come anew and is then judged as one that returns.
        self.dispatcher.fence(name, reason)
        return answer

    def _refuse_connected(self, name: str) -> None:
        live = self._fleet.nodes.get(name)
        if self.dispatcher.connected(name) or (live is not None and live.reachable):
            raise Conflict(
                f"node {name} answers, or did so seconds ago: its host is not off",
                field="action",
                allowed="drain; or fence once the node is Offline",
            )

    def _consequences(self, transaction: Transaction, name: str) -> dict[str, Any]:
        record = rows.require(transaction, name)
        owned = {container.id for container in container_rows.on_node(transaction.connection, name)}
        ended = [
            f"/1.0/operations/{operation.id}"
            for operation in operation_rows.unfinished(transaction.connection)
            if _concerns(operation, name, owned)
        ]
        return {
            "node": name,
            "mode": str(record.mode),
            "fenced_at": record.fenced_at,
            "fenced_by": record.fenced_by,
            "containers": sorted(owned),
            "operations": ended,
            "next": f"{RECOVER} makes one anew on another node, without the files that are on this host",
        }

    # ------------------------------------------------------------ what nodes report (LinkListener)

    def hello(self, node: str, hello: Hello) -> None:
        """An agent was let in."""
        self._listener.hello(node, hello)

    def inventory(self, node: str, inventory: Inventory) -> Mapping[str, int] | Awaitable[Mapping[str, int]]:
        """All that a node has: it counts as reachable when nothing runs there that belongs elsewhere."""
        answer = self._listener.inventory(node, inventory)
        live = self._fleet.nodes.get(node)
        self._look_elsewhere(node)
        if live is not None and (self._returns(live) or self._strays(node, inventory.containers)):
            return self._take_back(live, inventory, answer)
        self._is_back(node)
        return answer

    def _look_elsewhere(self, owner: str) -> None:
        """Now that a node has told what it has, look again at what was let be elsewhere until it did."""
        for node, live in self._fleet.nodes.items():
            for unclaimed in live.unclaimed.values():
                claimed = self._fleet.containers.get(unclaimed.report.id)
                if claimed is not None and claimed.record.node == owner:
                    self._judge(node, unclaimed.report)

    @staticmethod
    def _returns(node: LiveNode) -> bool:
        """Whether it was fenced and does not count as back yet."""
        return bool(node.fence) and not node.reachable

    async def _take_back(
        self, live: LiveNode, inventory: Inventory, answer: Mapping[str, int] | Awaitable[Mapping[str, int]]
    ) -> Mapping[str, int]:
        node, returns = live.record.name, self._returns(live)
        if inspect.isawaitable(answer):
            await answer
        if returns:
            await self._store.write(lambda transaction: _came_back(transaction, node))
        await self._stop_all(node, inventory.containers, thorough=returns)
        self._is_back(node)
        return await startable(self._store, self._fleet, node)

    def _is_back(self, node: str) -> None:
        live = self._fleet.nodes.get(node)
        if live is not None:
            live.returning = ""
        self.dispatcher.unfence(node)

    def samples(self, node: str, samples: Samples) -> None:
        """New figures."""
        self._listener.samples(node, samples)

    def state_changed(self, node: str, change: StateChanged) -> None:
        """A container changed by itself or by hand; one that runs elsewhere is stopped."""
        self._listener.state_changed(node, change)
        if not change.removed:
            self._judge(node, change.container)

    def _judge(self, node: str, report: ContainerReport) -> None:
        """Stop one that runs where it does not belong; there is one stop at a time for it."""
        if self._strays(node, [report]):
            stray = (node, report.id)
            begins = stray not in self._stopping
            self._stopping[stray] = report
            if begins:
                self._tasks.start(self._stop_alone(*stray), f"stray {report.id}")

    def node_status(self, node: str, status: NodeStatus, reason: str) -> None:
        """The node became reachable or not."""
        self._listener.node_status(node, status, reason)

    # ------------------------------------------------------------ what runs elsewhere

    def _strays(
        self, node: str, reports: Iterable[ContainerReport], thorough: bool = False
    ) -> list[tuple[ContainerReport, int]]:
        """What runs on a node and belongs to another, with the generation by which to stop it.

        `thorough` finds also what does not run yet: a start may be under way, behind which the stop then waits. What
        has a later generation is let be while an operation works (the target of a move, until the row is switched), and
        while the row's own node has it not (a move since the backup that was restored).
        """
        found = []
        for report in reports:
            live = self._fleet.containers.get(report.id)
            if live is None or live.record.node == node or report.generation == 0:
                continue
            later = report.generation > live.record.generation
            let_be = later and (live.record.operation is not None or self._is_absent(live))
            runs = report.status in (Status.RUNNING, Status.FROZEN)
            if (runs or (thorough and report.status != Status.ERROR)) and not let_be:
                found.append((report, max(report.generation, live.record.generation)))
        return found

    def _is_absent(self, container: LiveContainer) -> bool:
        """Whether the container's own node does not have it, or has not told yet since the controller started."""
        owner = self._fleet.nodes.get(container.record.node)
        return owner is not None and (owner.images is None or container.report is None)

    async def _stop_all(self, node: str, reports: Iterable[ContainerReport], thorough: bool = False) -> None:
        """Stop what runs elsewhere. Raises why that failed: the agent then has to come again."""
        strays = self._strays(node, reports, thorough)
        live = self._fleet.nodes.get(node)
        if not strays or live is None:
            return
        names = ", ".join(sorted(report.id for report, _ in strays))
        live.returning = f"its agent is connected and stops what belongs to other nodes by now: {names}"
        log.warning("containers are stopped: they belong to other nodes", extra={"node": node, "containers": names})
        try:
            await asyncio.gather(*(self._stop(node, report, generation) for report, generation in strays))
        except VzfleetError as error:
            live.returning = f"its agent is connected, but what belongs to other nodes is not stopped: {error.text}"
            raise
        live.returning = ""

    async def _stop_alone(self, node: str, container: str) -> None:
        told: ContainerReport | None = None
        try:
            # It may have been started again meanwhile.
            while (newest := self._stopping[node, container]) is not told:
                told = newest
                await self._stop_all(node, [told])
        except VzfleetError as error:
            log.error("a container runs twice", extra={"node": node, "container": container, "reason": error.text})
        finally:
            del self._stopping[node, container]

    async def _stop(self, node: str, report: ContainerReport, generation: int) -> None:
        # A new id each time: a failure of before must not be answered from the agent's journal.
        command = f"fence-{uuid.uuid4().hex}/stop/do"
        try:
            result = await self.dispatcher.call(
                node,
                StopContainer(report.id, 0, force=True),
                command=command,
                generation=generation,
                deadline=self._clock.monotonic() + STOP_TIME,
                early=True,
            )
        except NotFound:
            # It was removed meanwhile, by hand.
            return
        finally:
            self.dispatcher.acknowledge(node, [command])
        if result.outcome is not None and result.outcome.container is not None:
            self._fleet.state_changed(node, result.outcome.container, removed=False)


def require_fenced(transaction: Transaction, name: str) -> Node:
    """The row of a node that is fenced and has not come back. Raises Conflict, which says what to do."""
    record = rows.require(transaction, name)
    if record.mode is not NodeMode.FENCED:
        raise Conflict(
            f"node {name} is not fenced, what it has may run there: when its host is off and stays off, POST "
            f'/1.0/nodes/{name}/state with {{"action": "fence"}} first; else move the container',
            field="recover",
            allowed="a container whose node is fenced",
        )
    return record


def _came_back(transaction: Transaction, name: str) -> None:
    """From here on nothing of it is recovered elsewhere any more."""
    record = rows.rows.get(transaction.connection, name)
    if record is not None and record.mode is NodeMode.FENCED:
        rows.rows.replace(transaction, msgspec.structs.replace(record, mode=NodeMode.DRAINING))


def _concerns(operation: Operation, node: str, owned: set[str]) -> bool:
    return operation.node == node or not owned.isdisjoint(operation.containers)
