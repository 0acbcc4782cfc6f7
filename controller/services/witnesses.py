"""What agents have seen of the controller, against what it knows itself: they remember what its database has lost.

An agent's HELLO carries the highest epoch, generation and commit number that it has seen. A controller that is behind
them works on an older database: it raises its counters above them before the agent is let in, so that no fence is
ever passed twice, and accepts no writes until all nodes have told what they have.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from common.errors import VzfleetError
from common.messages import Hello, Inventory, Samples, StateChanged
from common.states import NodeStatus
from common.tasks import Tasks
from controller.dispatch.listener import LinkListener
from controller.events import Events
from controller.fleet import Fleet
from controller.services.reconciliation import Reconciliation
from controller.store import counters, operations
from controller.store.db import Database
from controller.store.events import RESTORED

log = logging.getLogger(__name__)
MOST_AHEAD = 1_000_000
"""Starts of the controller, or containers made, that an agent may have seen more: what claims more is not believed."""
_MOST_STRAYS = 1000


class Witnesses:
    """Stands between the dispatcher and `listener`, which hears everything as it would without.

    `epoch` is the controller's own; `raised` is told a higher one once that is durable.
    """

    def __init__(
        self,
        listener: LinkListener,
        reconciliation: Reconciliation,
        store: Database,
        fleet: Fleet,
        events: Events,
        epoch: int,
        raised: Callable[[int], None],
    ) -> None:
        self.epoch = epoch
        self._listener = listener
        self._reconciliation = reconciliation
        self._store = store
        self._fleet = fleet
        self._events = events
        self._raised = raised
        self._generation = 0
        self._doubted = 0
        """The highest commit that an agent has seen and this database never had: said once, not at each HELLO."""
        self._claims: dict[str, int] = {}
        self._raising = False
        self._strays: set[str] = set()
        self._tasks = Tasks("witnesses")

    async def close(self) -> None:
        """End what is under way."""
        await self._tasks.close()

    # ------------------------------------------------------------ before an agent is let in (Witness)

    @property
    def commit(self) -> int:
        """The number of the last commit."""
        return self._store.number

    def objection(self, node: str, hello: Hello) -> str | None:
        """Why an agent has to wait: the controller's counters are being raised. None when they are high enough."""
        if hello.epoch > self.epoch + MOST_AHEAD:
            return f"the agent claims to have seen epoch {hello.epoch}, which nobody believes (this is {self.epoch})"
        self._claims[node] = hello.generation
        if hello.epoch > self.epoch:
            self._doubt(node, f"node {node} has seen epoch {hello.epoch}, this controller is at {self.epoch}")
            if not self._raising:
                self._raising = True
                self._tasks.start(self._raise_epoch(hello.epoch), "raise the epoch")
            return "the controller's epoch is being raised above what the agent has seen"
        evidence = f"node {node} has seen commit {hello.commit}, the database ends at {self.commit}"
        if hello.commit > max(self.commit, self._doubted) and self._doubt(node, evidence):
            self._doubted = hello.commit
        return None

    def _doubt(self, node: str, evidence: str) -> bool:
        """Accept no writes for now, and say why; False when the evidence does not count."""
        live = self._fleet.nodes.get(node)
        if self._reconciliation.begun is not None:
            return True
        if live is None or live.record.facts is None:
            # A node that has just joined may have seen another controller.
            return False
        reason = f"the database is older than what the nodes have seen: {evidence}"
        try:
            self._reconciliation.begin(reason)
        except OSError as error:
            log.error("the reconcile-only mode cannot be kept", extra={"reason": str(error)})
            return False
        self._events.note(RESTORED, "/1.0", node=node, details={"reason": reason})
        return True

    async def _raise_epoch(self, seen: int) -> None:
        try:
            epoch = await self._store.write(lambda transaction: counters.raise_to(transaction, "epoch", seen + 1))
            log.error("the epoch was raised above what an agent has seen", extra={"epoch": epoch, "was": self.epoch})
            self.epoch = epoch
            self._raised(epoch)
        except VzfleetError as error:
            log.error("the epoch cannot be raised", extra={"reason": error.text})
        finally:
            self._raising = False

    # ------------------------------------------------------------ what nodes report (LinkListener)

    def hello(self, node: str, hello: Hello) -> None:
        """An agent was let in."""
        self._listener.hello(node, hello)

    def inventory(self, node: str, inventory: Inventory) -> Awaitable[Mapping[str, int]]:
        """All that a node has: generations are given above what it has seen from then on."""
        # At once, not when a task gets its turn: what the node reports next is newer.
        return self._take_in(node, inventory, self._listener.inventory(node, inventory))

    async def _take_in(
        self, node: str, inventory: Inventory, answer: Mapping[str, int] | Awaitable[Mapping[str, int]]
    ) -> Mapping[str, int]:
        generations = answer if isinstance(answer, Mapping) else await answer
        seen = max([self._claims.get(node, 0), *(report.generation for report in inventory.containers)])
        await self._raise_generation(seen)
        await self._reconciliation.delivered(node, inventory)
        return generations

    async def _raise_generation(self, seen: int) -> None:
        if seen <= self._generation:
            return
        self._generation = await self._store.read(lambda connection: counters.value(connection, "generation"))
        if seen > self._generation + MOST_AHEAD:
            log.error("a node's generation is not believed", extra={"seen": seen, "is": self._generation})
        elif seen > self._generation:
            log.error("generations are raised above what a node has", extra={"seen": seen, "was": self._generation})
            self._generation = await self._store.write(
                lambda transaction: counters.raise_to(transaction, "generation", seen)
            )

    def samples(self, node: str, samples: Samples) -> None:
        """New figures."""
        self._listener.samples(node, samples)

    def state_changed(self, node: str, change: StateChanged) -> None:
        """A container changed by itself or by hand."""
        self._listener.state_changed(node, change)

    def node_status(self, node: str, status: NodeStatus, reason: str) -> None:
        """The node became reachable or not."""
        self._listener.node_status(node, status, reason)

    # ------------------------------------------------------------ results that nobody waits for

    def stray(self, command: str) -> None:
        """A node has the result of a command whose operation does not run: said when no row knows that operation."""
        operation = command.partition("/")[0]
        if operation not in self._strays and len(self._strays) < _MOST_STRAYS:
            self._strays.add(operation)
            self._tasks.start(self._look_for(operation, command), f"stray {operation}")

    async def _look_for(self, operation: str, command: str) -> None:
        try:
            row = await self._store.read(lambda connection: operations.rows.get(connection, operation))
        except VzfleetError as error:
            log.error("a stray result cannot be looked up", extra={"command": command, "reason": error.text})
            return
        if row is None:
            log.error("a node carried out a command of an operation that no row knows", extra={"command": command})
            self._events.note("operation-unknown", f"/1.0/operations/{operation}", details={"command": command})
