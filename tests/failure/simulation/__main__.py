"""Run seeds by hand: `python -m tests.failure.simulation --seeds 10000`, or look at one: `--seed 7 --trace`."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time

from tests.failure.simulation.world import Outcome, simulate


def main() -> int:
    """The command line; 1 when a seed had a violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.failure.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    options = parser.parse_args()
    seeds = range(options.start, options.start + options.seeds) if options.seed is None else [options.seed]
    began, outcomes = time.monotonic(), []
    for seed in seeds:
        outcome = simulate(seed, print if options.trace else None)
        outcomes.append(outcome)
        if outcome.violations:
            print(outcome.describe(), flush=True)
    print(_summary(outcomes, time.monotonic() - began))
    return int(any(outcome.violations for outcome in outcomes))


def _summary(outcomes: list[Outcome], seconds: float) -> str:
    ended: dict[str, int] = {}
    for outcome in outcomes:
        for status, number in outcome.ended.items():
            ended[status] = ended.get(status, 0) + number
    failing = [outcome.seed for outcome in outcomes if outcome.violations]
    return (
        f"{len(outcomes)} seeds in {seconds:.1f} s ({seconds / max(1, len(outcomes)):.3f} s each): "
        f"{sum(outcome.faults for outcome in outcomes)} faults, {sum(map(_violations, outcomes))} violations in seeds "
        f"{failing[:20]}, accepted {sum(outcome.accepted for outcome in outcomes)}, ended {ended}, "
        f"left behind {sum(outcome.left_behind for outcome in outcomes)}, "
        f"settled after at most {max((outcome.settled_after for outcome in outcomes), default=0):.1f} s"
        f", trace {hashlib.sha256(''.join(outcome.digest for outcome in outcomes).encode()).hexdigest()[:16]}"
    )


def _violations(outcome: Outcome) -> int:
    return len(outcome.violations)


if __name__ == "__main__":
    sys.exit(main())
