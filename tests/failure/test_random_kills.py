"""F4: random `kill -9` of the controller and of agents under a steady load of mixed operations."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.failure.fleet import ProcessFleet, process_fleet
from tests.failure.invariants import operations, settled
from tests.failure.load import Load
from tests.failure.report import Report

pytestmark = pytest.mark.failure("F4")
NODES = 5
SHORT, LONG = 15, 200
RATE = 20.0
DELAYS = {"*": 0.02, "container.receive": 0.15, "container.start": 0.05}
"""Seconds that commands take at the fake driver, so that kills meet them under way."""


@pytest.fixture
def fleet() -> Iterator[ProcessFleet]:
    """Five nodes."""
    with process_fleet(NODES) as made:
        for node in made.nodes:
            made.script(node, delays=DELAYS)
        yield made


def kill_one(fleet: ProcessFleet, chance: random.Random) -> str:
    """Kill the controller or one of the agents, and start it again a little later; its name."""
    name = chance.choice(["controller", *fleet.nodes])
    process = fleet.processes()[name]
    process.kill()
    time.sleep(chance.uniform(0.0, 0.3))
    if name == "controller":
        fleet.start_controller(wait=False)
    else:
        fleet.start_agent(name)
    return name


def histories(found: str, known: dict[str, dict[str, Any]]) -> list[str]:
    """Of each operation that a violation names: all operations on its containers, to understand it by."""
    named = [each["resources"].get("containers") for identity, each in known.items() if identity in found]
    urls = {url for some in named for url in some or []}
    related = [each for each in known.values() if urls & set(each["resources"].get("containers") or [])]
    return [f"{each['created_at']} {each['id']} {each['kind']} {each['status']} {each['err']}" for each in related]


def test_random_kills_under_load(fleet: ProcessFleet, report: Report, long_run: bool) -> None:
    seed = int(os.environ.get("VZFLEET_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    chance = random.Random(seed)
    began = time.monotonic()
    load = Load(fleet, seed, RATE)
    with load.running() as accepted:
        while report.faults < (LONG if long_run else SHORT):
            # Long enough for operations to get under way, and for a controller to come up most of the times.
            time.sleep(chance.uniform(0.3, 1.5))
            kill_one(fleet, chance)
            report.faults += 1
    lasted = time.monotonic() - began
    fleet.heal()
    violations = settled(fleet, accepted.actions, accepted.expected)
    known = operations(fleet)
    for found in violations:
        report.violation(found)
        print(found, *histories(found, known), sep="\n  ")
    ends = [known[identity]["status"] for identity in accepted.actions if identity in known]
    report.figures |= {
        "operations acknowledged": len(accepted.actions),
        "a second": f"{len(accepted.actions) / lasted:.1f}",
        "lost": len(accepted.actions) - len(ends),
        "effects": len(fleet.effects()),
        **{f"ended as {end}": ends.count(end) for end in sorted(set(ends))},
    }
    assert len(accepted.actions) > report.faults, accepted
    assert ends.count("Success") > len(ends) / 2, accepted
