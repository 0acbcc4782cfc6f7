"""What agents claim to have seen, and what the controller makes of it: raised, doubted or not believed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.clock import SystemClock
from common.messages import Hello, Inventory
from controller.dispatch.listener import LinkListener
from controller.events import Events
from controller.fleet import Fleet
from controller.records import Node, NodeMode
from controller.services.reconciliation import Reconciliation
from controller.services.witnesses import MOST_AHEAD, Witnesses
from controller.store import counters, nodes, schema
from controller.store.db import Database
from controller.store.mark import Mark
from tests.helpers.cluster import until
from tests.helpers.core import FACTS
from tests.helpers.recording_listener import RecordingListener

THEN = "2026-01-01T00:00:00.000000Z"
HELLO = Hello(1, 1, "v", "boot", "machine", "instance", 1, 0.0)
INVENTORY = Inventory(FACTS, (), ())


class Core:
    """A controller's memory, store and witnesses, without a link."""

    def __init__(self, directory: Path, listener: LinkListener) -> None:
        self.fleet = Fleet(SystemClock())
        self.store = Database(f"sqlite:///{directory / 'db'}", self.fleet.apply, Mark(directory / "mark"))
        self.events = Events(self.store)
        self.reconciliation = Reconciliation(directory, self.fleet, self.store, self.events, SystemClock())
        self.raised: list[int] = []
        self.witnesses = Witnesses(
            listener, self.reconciliation, self.store, self.fleet, self.events, 5, self.raised.append
        )

    async def counter(self, name: str) -> int:
        return await self.store.read(lambda connection: counters.value(connection, name))


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[Core]:
    await asyncio.to_thread(schema.upgrade, f"sqlite:///{tmp_path / 'db'}")
    made = Core(tmp_path, RecordingListener())
    await made.store.open()
    for name in ("n1", "n2"):
        node = Node(name, name * 20, THEN, FACTS)
        await made.store.write(lambda transaction, node=node: nodes.rows.insert(transaction, node))
    await made.store.write(lambda transaction: counters.raise_to(transaction, "epoch", 5))
    yield made
    await made.witnesses.close()
    await made.events.close()
    await made.store.close()


async def test_who_has_seen_no_more_comes_in(core: Core) -> None:
    for hello in (HELLO, replace(HELLO, epoch=5, commit=core.store.number, generation=7)):
        assert core.witnesses.objection("n1", hello) is None
    assert core.reconciliation.begun is None and core.raised == []
    assert core.witnesses.commit == core.store.number > 0


async def test_a_higher_epoch_is_passed_durably_before_its_agent_comes_in(core: Core) -> None:
    higher = replace(HELLO, epoch=9)
    assert core.witnesses.objection("n1", higher) is not None
    assert core.witnesses.objection("n1", higher) is not None, "it waits until that is durable"
    await until(lambda: core.raised, "the epoch is raised")
    assert core.raised == [10] and core.witnesses.epoch == 10 == await core.counter("epoch")
    assert core.witnesses.objection("n1", higher) is None
    begun = core.reconciliation.begun
    assert begun is not None and "n1 has seen epoch 9" in begun.reason


async def test_what_nobody_believes_changes_nothing(core: Core) -> None:
    objection = core.witnesses.objection("n1", replace(HELLO, epoch=6 + MOST_AHEAD))
    assert objection is not None and "nobody believes" in objection
    assert core.witnesses.objection("n1", replace(HELLO, generation=2**62)) is None
    await core.witnesses.inventory("n1", INVENTORY)
    assert await core.counter("generation") == 0 and core.raised == [] and core.reconciliation.begun is None


async def test_generations_go_on_above_what_a_node_has_seen(core: Core) -> None:
    core.witnesses.objection("n1", replace(HELLO, generation=40))
    await core.witnesses.inventory("n1", INVENTORY)
    assert await core.counter("generation") == 40
    core.witnesses.objection("n2", replace(HELLO, generation=30))
    await core.witnesses.inventory("n2", INVENTORY)
    assert await core.store.write(lambda transaction: counters.advance(transaction, "generation")) == 41


async def test_a_node_that_has_just_joined_may_have_had_another_controller(core: Core) -> None:
    fresh = Node("n3", "n3" * 20, THEN)
    await core.store.write(lambda transaction: nodes.rows.insert(transaction, fresh))
    core.witnesses.objection("n3", replace(HELLO, commit=core.store.number + 1))
    assert core.reconciliation.begun is None
    core.witnesses.objection("n2", replace(HELLO, commit=core.store.number + 1))
    begun: Any = core.reconciliation.begun
    assert begun is not None and "n2 has seen commit" in begun.reason


async def test_the_same_claim_is_doubted_once(core: Core) -> None:
    """Commits that are gone stay gone: each new HELLO of the agent would begin the mode anew."""
    claim = replace(HELLO, commit=core.store.number + 100)
    assert core.witnesses.objection("n2", claim) is None and core.reconciliation.begun is not None
    core.reconciliation.end("anna")
    assert core.witnesses.objection("n2", claim) is None and core.reconciliation.begun is None
    core.witnesses.objection("n1", replace(claim, commit=claim.commit + 1))
    assert core.reconciliation.begun is not None


async def test_it_ends_with_the_last_inventory_that_is_awaited(core: Core) -> None:
    core.reconciliation.begin("so")
    assert core.reconciliation.awaited == ["n1", "n2"]
    await core.witnesses.inventory("n1", INVENTORY)
    assert core.reconciliation.begun is not None and core.reconciliation.awaited == ["n2"]
    fenced = replace(core.fleet.nodes["n2"].record, mode=NodeMode.FENCED)
    await core.store.write(lambda transaction: nodes.rows.replace(transaction, fenced))
    assert core.reconciliation.begun is None, "a host that is off need not be waited for"
    assert list(core.reconciliation._file.parent.glob("reconcile*")) == []


async def test_an_inventory_is_believed_before_anything_that_comes_after_it(core: Core) -> None:
    """A result that follows it at once is newer, and must not be overwritten by it."""
    listener = RecordingListener()
    witnesses = Witnesses(listener, core.reconciliation, core.store, core.fleet, core.events, 5, core.raised.append)
    answer = witnesses.inventory("n1", INVENTORY)
    try:
        assert listener.of("inventory", "n1") == [INVENTORY]
        assert await answer == listener.generations
    finally:
        await witnesses.close()
