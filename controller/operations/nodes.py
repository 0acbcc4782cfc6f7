"""Draining a node and taking that back, container by container, each by an operation of its own.

Level-triggered: what is left is asked anew after each container, and what was done stands in the children's rows. So a
drain goes on after a restart of the controller, and a second one does what the first one left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from common.errors import Busy, Conflict, Unsupported, VzfleetError
from common.states import Status
from controller.operations.kinds import Context, Evacuation, Kind, Step
from controller.records import Operation
from controller.store.db import Transaction

TRIES = 3
"""How often a container is tried that others are busy with."""
NAMED = 10
"""How many of the containers that are left an error names; all of them stand in the operation's metadata."""


class DrainParameters(Struct, frozen=True):
    """A drain: containers are moved away (`move`), or stopped where they are. `timeout` in seconds is a stop's."""

    node: str
    move: bool
    timeout: float
    force: bool


class Task(Struct, frozen=True):
    """What is to be done with a container that has this generation: `move` (to `node`), `stop`, `start`, or `leave`.

    `reason` says why it goes there, or stays.
    """

    container: str
    generation: int
    action: str
    node: str
    reason: str = ""


class RestoreParameters(Struct, frozen=True):
    """Taking a drain back: what it stopped is started, and what it moved away is moved to `node` again."""

    node: str
    tasks: tuple[Task, ...]


@dataclass
class Account:
    """What became of each container."""

    done: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    left: list[dict[str, Any]] = field(default_factory=list)

    def enter(self, child: Operation) -> None:
        """A child has ended."""
        container, url = child.containers[0], f"/1.0/operations/{child.id}"
        entry = {"container": container, "action": child.kind.removeprefix("container."), "operation": url}
        if child.status is Status.SUCCESS:
            self.done.append({**entry, "node": child.node})
        else:
            self.failed.append({**entry, "reason": child.error.text if child.error else child.status.text})

    def leave(self, container: str, reason: str) -> None:
        """Nothing can be done with this one."""
        self.left.append({"container": container, "reason": reason})

    @property
    def seen(self) -> set[str]:
        """The containers that need no second look."""
        return {str(entry["container"]) for entry in (*self.done, *self.failed, *self.left)}

    def facts(self, now: str | None) -> dict[str, Any]:
        """What the operation shows."""
        return {"done": list(self.done), "failed": list(self.failed), "left": list(self.left), "now": now}


async def _one_by_one(context: Context) -> None:
    """Raises Conflict that names what is left when not all could be done."""
    evacuation, operation = context.resources.evacuation, context.operation
    if evacuation is None:
        raise Unsupported("this controller drains no nodes")
    await evacuation.gathered()
    account = Account()
    for child in await evacuation.children(operation):
        account.enter(await evacuation.ended(child.id))
    while waiting := await _unseen(evacuation, operation, account):
        context.tell(account.facts(waiting[0]))
        context.report(waiting[0], 100 * len(account.seen) // (len(account.seen) + len(waiting)))
        await one(evacuation, operation, waiting[0], account)
    context.tell(account.facts(None))
    _judge(account)


async def _unseen(evacuation: Evacuation, operation: Operation, account: Account) -> list[str]:
    seen = account.seen
    return [container for container in await evacuation.waiting(operation) if container not in seen]


def _judge(account: Account) -> None:
    missed = [*account.failed, *account.left]
    if missed:
        names = "; ".join(f"{entry['container']}: {entry['reason']}" for entry in missed[:NAMED])
        more = f"; and {len(missed) - NAMED} more" if len(missed) > NAMED else ""
        raise Conflict(f"{len(missed)} of {len(account.seen)} containers could not be dealt with: {names}{more}")


async def one(evacuation: Evacuation, operation: Operation, container: str, account: Account) -> None:
    """Deal with one container by a child of `operation`, and enter into the account what became of it."""
    for attempt in range(TRIES):
        try:
            child = await evacuation.begin(operation, container)
        except Busy as error:
            if attempt + 1 == TRIES:
                account.leave(container, error.text)
            else:
                await evacuation.ended(str(error.details["operation"]).rpartition("/")[2])
                if container not in await evacuation.waiting(operation):
                    return  # the other operation has done it
        except VzfleetError as error:
            account.leave(container, error.text)
            return
        else:
            account.enter(await evacuation.ended(child.id))
            return


def _nothing(_transaction: Transaction, _operation: Operation) -> None:
    """The rows of the containers are written by the children."""


DRAIN = Kind("node.drain", "Draining node", (Step("drain", _one_by_one),), 7 * 86400, _nothing, _nothing)
RESTORE = Kind("node.restore", "Restoring node", (Step("restore", _one_by_one),), 7 * 86400, _nothing, _nothing)
