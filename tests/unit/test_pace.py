"""How often something is told: at once, then once in an interval, the last time included."""

from __future__ import annotations

import asyncio

from controller.operations.pace import Pace

INTERVAL = 0.05


async def test_the_first_is_told_at_once_and_the_last_in_the_end() -> None:
    told: list[float] = []
    loop = asyncio.get_running_loop()
    pace = Pace(lambda: told.append(loop.time()), INTERVAL)
    for _ in range(100):
        pace.new()
    assert len(told) == 1
    await asyncio.sleep(3 * INTERVAL)
    assert len(told) == 2 and told[1] - told[0] >= INTERVAL * 0.99
    pace.new()
    assert len(told) == 3


async def test_nothing_is_told_once_it_is_closed() -> None:
    told: list[int] = []
    pace = Pace(lambda: told.append(1), INTERVAL)
    pace.new()
    pace.new()
    pace.close()
    await asyncio.sleep(2 * INTERVAL)
    pace.new()
    assert told == [1]
