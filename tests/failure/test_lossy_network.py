"""F6: a network that delays by 200 ms each way, loses every tenth packet, or carries nothing in one direction.

The loss and the delay are made by a process of ours between two taps (wire.py), in place of netem.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest

from tests.failure.fleet import ProcessFleet, until
from tests.failure.invariants import check_ends, operations, settled
from tests.failure.load import Load
from tests.failure.network import ADDRESS, Network, Wire, needed, network
from tests.failure.report import Report
from tests.failure.test_partitions import AS_SHIPPED, check_healing, expected_of, noted_fleet

pytestmark = needed
NODES = 2
RATE = 5.0
SHORT, LONG = 5.0, 60.0
"""Seconds of each trouble."""
END_WITHIN = 90.0


@dataclass(frozen=True)
class Trouble:
    """What the wire of each node does."""

    name: str
    fault: dict[str, float]
    usable: bool = True
    """Whether operations end while it lasts."""


TROUBLES = (
    Trouble("delay 200 ms", {"delay": 0.2}),
    Trouble("10 % loss", {"lost_to_node": 0.1, "lost_to_controller": 0.1}),
    Trouble("delay and loss", {"delay": 0.2, "lost_to_node": 0.1, "lost_to_controller": 0.1}),
    Trouble("nothing reaches the nodes", {"lost_to_node": 1.0}, usable=False),
    Trouble("nothing reaches the controller", {"lost_to_controller": 1.0}, usable=False),
)


def endure(fleet: ProcessFleet, net: Network, trouble: Trouble, load: Load, seconds: float, report: Report) -> None:
    """A load through a time of trouble: what was accepted ends, meanwhile where it can, else once it is over."""
    with load.running() as accepted:
        until(lambda: len(accepted.actions) > 5, "a load is on", 30)
        for cable in net.cables.values():
            cable.set(**trouble.fault)
            report.faults += 1
        began, before = time.monotonic(), len(accepted.actions)
        time.sleep(seconds)
    if trouble.usable:
        ended = _ended(fleet, list(accepted.actions))
        report.check(not ended, f"with {trouble.name}: {ended}")
        report.check(len(accepted.actions) > before, f"with {trouble.name}: nothing was accepted")
        report.figures[f"all ended with {trouble.name} after s"] = f"{time.monotonic() - began:.1f}"
    for cable in net.cables.values():
        cable.set()
    check_healing(fleet, list(accepted.actions), report, time.monotonic())


def _ended(fleet: ProcessFleet, accepted: list[str]) -> list[str]:
    """I1, while the trouble lasts."""
    end = time.monotonic() + END_WITHIN
    for identity in accepted:
        fleet.operation(identity, max(0.0, end - time.monotonic()))
    return check_ends(accepted, operations(fleet))


@pytest.mark.failure("F6")
def test_delay_loss_and_one_way_loss(report: Report, long_run: bool) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with network(NODES, Wire) as net, noted_fleet(address=ADDRESS, launcher=net.launcher, **AS_SHIPPED) as noted:
        fleet, begun = noted
        loads: list[Load] = []
        for turn, trouble in enumerate(TROUBLES):
            loads.append(Load(fleet, seed + turn, RATE, population=10))
            endure(fleet, net, trouble, loads[-1], LONG if long_run else SHORT, report)
        expected = expected_of(loads)
        for found in settled(fleet, expected, expected) + begun.violations():
            report.violation(found)
        report.figures |= {"operations": len(expected), "begun": len(begun.entries())}


@pytest.mark.failure("F6 without a session's end")
def test_a_link_that_never_heals_is_caught(report: Report) -> None:
    """Were a broken link not made anew, the healing would not be there in time."""
    with network(1, Wire) as net, noted_fleet(address=ADDRESS, launcher=net.launcher, nodes=1) as (fleet, begun):
        assert begun.entries() == []
        net.cables["node1"].set(lost_to_node=1.0)
        found = Report("not healed")
        report.faults += 1
        until(lambda: fleet.node_status("node1") == "Offline", "it shows Offline", 20)
        with pytest.raises(AssertionError, match="all are Online"):
            check_healing(fleet, [], found, time.monotonic(), patience=2.0)
