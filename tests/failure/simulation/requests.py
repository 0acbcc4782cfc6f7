"""What clients ask: a list of requests, each with its weight. A new kind of operation is one more line here."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from common.errors import NotFound
from common.states import Status
from controller.api.services import Services
from controller.records import Operation
from controller.services.caller import Caller
from controller.services.requests import (
    CopySource,
    CreateBody,
    ImageSource,
    NoSource,
    RenameBody,
    SnapshotBody,
    SnapshotRenameBody,
    SnapshotUpdateBody,
    StateBody,
    UpdateBody,
)

CALLER = Caller("client", "admin", "tls", "127.0.0.1", "request")
FINGERPRINT = "f" * 64
IDS = [str(number) for number in range(101, 115)]
CONFIGS: list[dict[str, str]] = [
    {},
    {"limits.memory": "100MB"},
    {"limits.memory": "200MB", "boot.autostart": "true"},
    {"limits.memory": "10%", "limits.disk": "1GB"},
    {"snapshots.schedule": "* * * * *", "snapshots.expiry": "1M", "snapshots.schedule.stopped": "true"},
]


@dataclass
class Asking:
    """One request: the controller that is asked, and the dice."""

    services: Services
    chance: random.Random

    @property
    def container(self) -> str:
        """One of those that exist; NotFound when there is none."""
        known = sorted(self.services.fleet.containers)
        if not known:
            raise NotFound("there are no containers")
        return self.chance.choice(known)

    @property
    def snapshot(self) -> tuple[str, str]:
        """A container with one of its snapshots; NotFound when there is none."""
        containers = self.services.fleet.containers
        known = sorted((id, name) for id, live in containers.items() for name in live.snapshots)
        if not known:
            raise NotFound("there are no snapshots")
        return self.chance.choice(known)

    @property
    def node(self) -> str:
        """One of the nodes."""
        return self.chance.choice(sorted(self.services.fleet.nodes))

    def maybe(self, value: Any) -> Any:
        """The value in half of the cases, else None."""
        return value if self.chance.random() < 0.5 else None


Ask = Callable[[Asking], Awaitable[Operation | None]]


@dataclass(frozen=True)
class Request:
    """A kind of request and how often it is made, compared with the others."""

    name: str
    weight: float
    ask: Ask


def _create(asking: Asking) -> Awaitable[Operation]:
    source = asking.chance.choice((NoSource(), ImageSource(fingerprint=FINGERPRINT)))
    body = CreateBody(
        source, config=asking.chance.choice(CONFIGS), node=asking.maybe(asking.node), start=asking.chance.random() < 0.7
    )
    return asking.services.containers.create(CALLER, asking.chance.choice(IDS), body)


def _state(action: Literal["start", "stop", "restart", "freeze", "unfreeze"]) -> Ask:
    def ask(asking: Asking) -> Awaitable[Operation]:
        body = StateBody(action, timeout=3, force=asking.chance.random() < 0.5)
        return asking.services.states.change(CALLER, asking.container, body)

    return ask


def _delete(asking: Asking) -> Awaitable[Operation]:
    return asking.services.changes.delete(CALLER, asking.container, force=asking.chance.random() < 0.7)


def _update(asking: Asking) -> Awaitable[Operation]:
    return asking.services.changes.update(CALLER, asking.container, UpdateBody(asking.chance.choice(CONFIGS)), None)


def _rename(asking: Asking) -> Awaitable[Operation]:
    hostname = f"host-{asking.chance.randrange(100)}"
    body = RenameBody(hostname=hostname, name=asking.maybe(asking.chance.choice(IDS)))
    return asking.services.changes.rename(CALLER, asking.container, body)


def _copy(asking: Asking) -> Awaitable[Operation]:
    body = CreateBody(CopySource(asking.container), node=asking.maybe(asking.node), start=asking.chance.random() < 0.5)
    return asking.services.containers.create(CALLER, asking.chance.choice(IDS), body)


def _copy_snapshot(asking: Asking) -> Awaitable[Operation]:
    body = CreateBody(CopySource("/".join(asking.snapshot)), node=asking.maybe(asking.node))
    return asking.services.containers.create(CALLER, asking.chance.choice(IDS), body)


def _refresh(asking: Asking) -> Awaitable[Operation]:
    source = CopySource(asking.container, refresh=True)
    return asking.services.refreshes.refresh(CALLER, asking.container, CreateBody(source), source)


def _move(asking: Asking) -> Awaitable[Operation]:
    name = asking.chance.choice(IDS) if asking.chance.random() < 0.2 else None
    return asking.services.moves.move(CALLER, asking.container, RenameBody(name=name, node=asking.node, migration=True))


def _take_snapshot(asking: Asking) -> Awaitable[Operation]:
    return asking.services.snapshots.take(CALLER, asking.container, SnapshotBody())


def _delete_snapshot(asking: Asking) -> Awaitable[Operation]:
    return asking.services.snapshots.delete(CALLER, *asking.snapshot)


def _rename_snapshot(asking: Asking) -> Awaitable[Operation]:
    body = SnapshotRenameBody(f"renamed{asking.chance.randrange(3)}")
    return asking.services.snapshots.rename(CALLER, *asking.snapshot, body)


def _update_snapshot(asking: Asking) -> Awaitable[Operation]:
    body = SnapshotUpdateBody(asking.maybe(datetime(2100, 1, 1, tzinfo=UTC)))
    return asking.services.snapshots.update(CALLER, *asking.snapshot, body, None)


def _restore_snapshot(asking: Asking) -> Awaitable[Operation]:
    return asking.services.snapshots.restore(CALLER, *asking.snapshot)


async def _cancel(asking: Asking) -> None:
    running = await asking.services.operations.find(
        container=None, node=None, status=Status.RUNNING, limit=20, before=None
    )
    if not running:
        raise NotFound("nothing runs")
    await asking.services.operations.cancel(asking.chance.choice(running).id)


REQUESTS: list[Request] = [
    Request("create", 10, _create),
    Request("start", 4, _state("start")),
    Request("stop", 4, _state("stop")),
    Request("restart", 2, _state("restart")),
    Request("freeze", 1, _state("freeze")),
    Request("unfreeze", 1, _state("unfreeze")),
    Request("delete", 3, _delete),
    Request("update", 3, _update),
    Request("rename", 2, _rename),
    Request("copy", 3, _copy),
    Request("copy snapshot", 1, _copy_snapshot),
    Request("refresh", 3, _refresh),
    Request("move", 6, _move),
    Request("take snapshot", 3, _take_snapshot),
    Request("delete snapshot", 1, _delete_snapshot),
    Request("rename snapshot", 1, _rename_snapshot),
    Request("update snapshot", 1, _update_snapshot),
    Request("restore snapshot", 2, _restore_snapshot),
    Request("cancel", 6, _cancel),
]


def choose(chance: random.Random) -> Request:
    """One of the requests, by weight."""
    return chance.choices(REQUESTS, [request.weight for request in REQUESTS])[0]
