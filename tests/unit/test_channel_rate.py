"""The bandwidth limit: kept over time, even within it, and never in the way when there is none."""

from __future__ import annotations

import pytest

from agent.channel.rate import SMALLEST, SMOOTHNESS, Rate
from agent.channel.window import FRAME


@pytest.mark.parametrize("rate", [10_000, 1_000_000, 50_000_000, 3_000_000_000])
def test_the_rate_is_kept_and_even(rate: int) -> None:
    now = 1000.0
    limit = Rate(rate, now)
    sent, most = 0, 0.0
    while now < 1030.0:
        delay = limit.delay(now)
        most = max(most, delay)
        now += delay
        assert limit.delay(now) < 1e-6
        limit.spend(limit.frame)
        sent += limit.frame
        if rate >= 10**9 and now - 1000.0 > 0.2:
            break
    assert sent / (now - 1000.0 or 1.0) == pytest.approx(rate, rel=0.05, abs=limit.frame + rate * SMOOTHNESS)
    assert most <= max(SMALLEST / rate, SMOOTHNESS) * 1.01


def test_a_pause_is_not_made_up_for() -> None:
    limit = Rate(1_000_000, 0.0)
    sent = 0
    while limit.delay(3600.0) <= 0:
        limit.spend(limit.frame)
        sent += limit.frame
    assert sent <= 1_000_000 * SMOOTHNESS + limit.frame


def test_without_a_limit() -> None:
    limit = Rate(None, 0.0)
    assert limit.frame == FRAME
    for _ in range(1000):
        limit.spend(FRAME)
        assert limit.delay(0.0) == 0.0
