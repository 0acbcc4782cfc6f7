"""F5: the network between a node and the controller is gone for a while, by its veth taken down.

Offline is shown within 10 s, what expired meanwhile is never begun, and 10 s after healing the API is right.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.failure.begun import HANG, HUNG, Begun
from tests.failure.fleet import ProcessFleet, process_fleet, until
from tests.failure.invariants import check_effects, check_same, operations, settled, shown, worlds
from tests.failure.load import Load
from tests.failure.network import ADDRESS, needed, network
from tests.failure.points import Effects
from tests.failure.report import Report

pytestmark = needed
NODES = 2
SHORT, LONG = (1.0, 12.0), (1.0, 5.0, 12.0, 30.0, 90.0)
OFFLINE_WITHIN = HEALED_WITHIN = 10.0
RATE = 8.0
DELAYS = {"*": 0.02, "container.start": 0.3}
AS_SHIPPED: dict[str, Any] = {"heartbeat_interval": 1.5, "heartbeat_timeout": 8.0}
PATIENT: dict[str, Any] = {"heartbeat_timeout": 2 * HUNG}
"""So that a session outlives a command: with shorter times it ends first, and its commands with it."""


@contextmanager
def noted_fleet(
    nodes: int = NODES, *, believes_all: bool = False, **options: Any
) -> Iterator[tuple[ProcessFleet, Begun]]:
    """Nodes whose agents note what they begin."""
    with process_fleet(0, **options) as fleet:
        fleet.start_controller()
        begun = Begun(fleet)
        for number in range(1, nodes + 1):
            fleet.join(f"node{number}")
            fleet.script(f"node{number}", delays=DELAYS)
            fleet.start_agent(f"node{number}", **begun.environment(f"node{number}", believes_all))
        fleet.wait_online()
        yield fleet, begun


def agrees(fleet: ProcessFleet) -> bool:
    """Whether the API says of every container that is busy with nothing what its node has."""
    return not check_same(shown(fleet), worlds(fleet))


def expected_of(loads: list[Load]) -> dict[str, Effects]:
    """What the operations of these loads stand for.

    A load may ask for a start just when another one of the same container has ended: that one finds it running.
    """
    found = {}
    for load in loads:
        for identity, effects in load.accepted.expected.items():
            found[identity] = [] if load.accepted.actions[identity] in ("start", "stop") else effects
    return found


def seconds_until_offline(fleet: ProcessFleet, node: str, report: Report, began: float) -> float:
    """Wait until the node shows Offline."""
    until(lambda: fleet.node_status(node) == "Offline", f"{node} shows Offline", OFFLINE_WITHIN + 5, every=0.05)
    took = time.monotonic() - began
    report.check(took <= OFFLINE_WITHIN, f"F5: Offline was shown after {took:.1f} s only")
    return took


def check_healing(
    fleet: ProcessFleet, accepted: list[str], report: Report, healed: float, patience: float = 30.0
) -> float:
    """I5 in time: the nodes are Online, what was under way has ended, and the API agrees with them."""
    until(
        lambda: all(fleet.node_status(node) == "Online" for node in fleet.nodes), "all are Online", patience, every=0.05
    )
    online = time.monotonic() - healed
    for identity in accepted:
        fleet.operation(identity, 30)
    until(lambda: agrees(fleet), "the API says what the nodes have", 30, every=0.05)
    took = time.monotonic() - healed
    report.check(took <= HEALED_WITHIN, f"I5: right {took:.1f} s after healing only (Online after {online:.1f} s)")
    return took


@pytest.mark.failure("F5")
def test_partitions(report: Report, long_run: bool) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with network(NODES) as net, noted_fleet(address=ADDRESS, launcher=net.launcher, **AS_SHIPPED) as (fleet, begun):
        loads, offline, healing = [], [], []
        for turn, seconds in enumerate(LONG if long_run else SHORT):
            node = fleet.nodes[turn % NODES]
            loads.append(Load(fleet, seed + turn, RATE, population=12))
            with loads[-1].running() as accepted:
                until(lambda accepted=accepted: len(accepted.actions) > 5, "a load is on")
                began = time.monotonic()
                net.cables[node].set(down=True)
                report.faults += 1
                if seconds > OFFLINE_WITHIN:
                    offline.append(seconds_until_offline(fleet, node, report, began))
                time.sleep(max(0.0, began + seconds - time.monotonic()))
            net.cables[node].set()
            healing.append(check_healing(fleet, list(accepted.actions), report, time.monotonic()))
        expected = expected_of(loads)
        for found in settled(fleet, expected, expected) + begun.violations():
            report.violation(found)
        report.figures |= {
            "operations": len(expected),
            "begun": len(begun.entries()),
            "Offline shown after s": f"{max(offline):.1f}",
            "right after s": f"{max(healing):.1f}",
        }


def hang_with_commands(fleet: ProcessFleet, node: str) -> list[str]:
    """Have an agent stand still while commands arrive, until they have expired."""
    os.kill(fleet.agents[node].pid, HANG)
    body = {"source": {"type": "none"}, "node": node, "start": True}
    answers = [fleet.request("POST", f"/1.0/vz/late-{number}", body) for number in range(8)]
    until(lambda: fleet.node_status(node) == "Suspect", "it is missed", OFFLINE_WITHIN)
    fleet.wait_online(node, seconds=2 * HUNG)
    return [answer.operation for answer in answers if answer.operation is not None]


def refused_as_expired(fleet: ProcessFleet, node: str) -> int:
    """How many commands an agent refused because they came too late."""
    return (fleet.directory / f"{node}.log").read_text(errors="replace").count("the command expired")


@pytest.mark.failure("F5 hung agent")
def test_commands_that_waited_too_long_are_never_begun(report: Report) -> None:
    """What was sent to an agent that stands still is kept for it, and it hears all at once when it goes on."""
    with noted_fleet(**PATIENT) as (fleet, begun):
        accepted = hang_with_commands(fleet, "node1")
        report.faults += len(accepted)
        for found in settled(fleet, accepted) + begun.violations():
            report.violation(found)
        report.figures["refused as expired"] = refused_as_expired(fleet, "node1")
        assert refused_as_expired(fleet, "node1") > 0, "nothing came late: nothing was proven"


@pytest.mark.failure("F5 without expiry")
def test_an_agent_that_ignores_expiry_is_caught(report: Report) -> None:
    with noted_fleet(believes_all=True, **PATIENT) as (fleet, begun):
        accepted = hang_with_commands(fleet, "node1")
        for identity in accepted:
            fleet.operation(identity)
        report.faults += len(accepted)
        assert any("after it had expired" in found for found in begun.violations())
        assert not check_effects(fleet.effects(), operations(fleet)), "the journal alone still keeps to one effect"
