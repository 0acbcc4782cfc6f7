"""Copying a container, or one of its snapshots: to a new one on any node, or into one that is there (a refresh)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from msgspec import Struct

from common.commands import CopyContainer, DeleteContainer, StartContainer
from common.reports import ContainerSpec
from controller.operations.containers import creation_failed
from controller.operations.kinds import Context, Kind, Step
from controller.operations.power import leave, started
from controller.operations.transfers import Journey, end, ended, raise_first, travel
from controller.records import Operation, Phase
from controller.store import containers as rows
from controller.store.db import Transaction


class CopyParameters(Struct, frozen=True):
    """A copy: `spec` is the copy's, `source` the original's; `snapshot` when it is one that is copied.

    `rate`: bytes per second at most, to another node. A refresh does not start.
    """

    spec: ContainerSpec
    node: str
    source: ContainerSpec
    source_node: str
    snapshot: str | None
    start: bool
    rate: int | None = None

    @property
    def here(self) -> bool:
        """Whether nothing leaves its node."""
        return self.node == self.source_node

    def journey(self, refresh: bool) -> Journey:
        """The way to the other node."""
        return Journey(
            self.source_node,
            self.source,
            self.node,
            self.spec,
            self.rate,
            snapshot=self.snapshot,
            refresh=refresh,
        )


async def _carry(context: Context, refresh: bool) -> dict[str, Any] | None:
    wanted = context.parameters(CopyParameters)
    if wanted.here:
        arguments = CopyContainer(wanted.spec, wanted.source.id, wanted.snapshot, refresh)
        await context.command(wanted.node, arguments, wanted.spec.generation)
        return None
    return await travel(context, wanted.journey(refresh), last=True, stage="copying")


async def _end(context: Context) -> None:
    wanted = context.parameters(CopyParameters)
    if not wanted.here:
        await end(context, wanted.journey(refresh=False))


async def _clean(context: Context) -> dict[str, str] | None:
    """The copy is whole and works: it is not thrown away because a node is out of reach by now."""
    wanted = context.parameters(CopyParameters)
    reason = None if wanted.here else await ended(context, wanted.journey(refresh=False))
    return None if reason is None else {"left_behind": reason}


# ---------------------------------------------------------------- to a new container


async def _copy(context: Context) -> dict[str, Any] | None:
    return await _carry(context, refresh=False)


async def _take_back(context: Context) -> None:
    raise_first(await asyncio.gather(_delete_copy(context), _end(context), return_exceptions=True))


async def _delete_copy(context: Context) -> None:
    wanted = context.parameters(CopyParameters)
    if not context.refused:
        await context.command(
            wanted.node, DeleteContainer(wanted.spec.id, wanted.spec.generation, force=True), wanted.spec.generation
        )


async def _start_copy(context: Context) -> None:
    wanted = context.parameters(CopyParameters)
    if wanted.start:
        await context.command(wanted.node, StartContainer(wanted.spec.id), wanted.spec.generation)


def _copied(transaction: Transaction, operation: Operation) -> None:
    record = rows.require(transaction, operation.containers[0])
    rows.rows.replace(transaction, msgspec.structs.replace(record, phase=Phase.READY, error=None))
    leave(transaction, operation, started(operation.parameters["start"]))


COPY = Kind(
    name="container.copy",
    description="Copying container",
    steps=(
        Step("copy", _copy, _take_back),
        Step("start", _start_copy),
        Step("clean", _clean),
    ),
    timeout=24 * 3600,
    succeeded=_copied,
    failed=creation_failed,
    no_return=2,
)


# ---------------------------------------------------------------- into one that is there


async def _nothing(_context: Context) -> None:
    return


async def _refresh(context: Context) -> dict[str, Any] | None:
    return await _carry(context, refresh=True)


REFRESH = Kind(
    name="container.refresh",
    description="Refreshing container",
    # It has the old files until it has the new ones: there is nothing to take back but what the transfer keeps.
    steps=(Step("begin", _nothing, _end), Step("refresh", _refresh), Step("clean", _clean)),
    timeout=24 * 3600,
    succeeded=rows.release,
    failed=rows.release,
    no_return=2,
)
