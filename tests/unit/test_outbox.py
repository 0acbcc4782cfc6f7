"""What waits to be sent: replies before samples, the inventory before both, nothing without a session."""

from __future__ import annotations

import asyncio

import pytest

from agent.outbox import KEPT_TICKS, Outbox
from common.messages import Accepted, Inventory, Samples
from common.reports import NodeFacts, NodeSample

INVENTORY = Inventory(NodeFacts("h", "x86_64", 2, 1, 1, "fake", "1", "dir", "6.1", "v1", "0"), (), ())
LOAD = NodeSample(1, 1, None, (0.0, 0.0, 0.0), 1.0)


def tick(number: int) -> list[Samples]:
    return [Samples(float(number), LOAD, ()), Samples(number + 0.5, LOAD, ())]


async def test_the_inventory_goes_first_then_replies_in_order_then_the_newest_ticks() -> None:
    outbox = Outbox()
    outbox.open()
    for number in range(KEPT_TICKS + 2):
        outbox.offer(tick(number))
    outbox.put(Accepted("a"))
    outbox.put(Accepted("b"))
    taking = asyncio.ensure_future(outbox.take())
    await asyncio.sleep(0)
    assert not taking.done(), "an open outbox is held until the inventory"
    outbox.release(INVENTORY)
    taken = [await taking] + [await outbox.take() for _ in range(2 + KEPT_TICKS)]
    assert taken == [(INVENTORY,), (Accepted("a"),), (Accepted("b"),), tick(2), tick(3), tick(4)]


async def test_it_is_held_again_while_another_inventory_is_taken() -> None:
    outbox = Outbox()
    outbox.open()
    outbox.release(INVENTORY)
    await outbox.take()
    outbox.hold()
    outbox.put(Accepted("late"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.take(), 0.01)
    outbox.release(INVENTORY)
    assert [await outbox.take(), await outbox.take()] == [(INVENTORY,), (Accepted("late"),)]


async def test_what_waits_ends_with_its_session() -> None:
    outbox = Outbox()
    outbox.put(Accepted("before"))
    outbox.open()
    outbox.put(Accepted("in it"))
    outbox.offer(tick(0))
    outbox.close()
    outbox.offer(tick(1))
    outbox.open()
    outbox.release(INVENTORY)
    assert await outbox.take() == (INVENTORY,)
    outbox.put(Accepted("in the next"))
    assert await outbox.take() == (Accepted("in the next"),)
