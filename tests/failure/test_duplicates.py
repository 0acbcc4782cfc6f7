"""F12: two agents with one key. Of one host the older is fenced, of two hosts both are kept out; nothing flaps."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.dispatch.duplicates import QUIET
from tests.failure.fleet import ProcessFleet, process_fleet, until
from tests.failure.invariants import check_effects, operations
from tests.failure.report import Report

NODE, TWIN = "node1", "node1-twin"
KNOWN_WITHIN = 5.0
ASKED_AGAIN = 10.0
"""Longest delay of an agent that was refused (agent.link.Backoff), and with it of whatever ends with its next try."""
WATCHED = 8.0
"""Seconds in which an agent that was refused for the first time asks at least once more."""
ON_ANOTHER_HOST = 'mount --bind "$0" /etc/machine-id && exec "$@"'


@pytest.fixture
def fleet() -> Iterator[ProcessFleet]:
    """One node, whose twin runs on another host where a file names its machine."""
    with process_fleet(1) as made:
        machine = made.directory / "machine-id"

        def launcher(name: str) -> list[str]:
            if name != TWIN or not machine.exists():
                return []
            return ["unshare", "--mount", "--", "sh", "-c", ON_ANOTHER_HOST, str(machine)]

        made.launcher = launcher
        yield made


def start_twin(fleet: ProcessFleet, machine_id: str = "") -> float:
    """Copy the agent's directory as it stands and run an agent in it; when that was."""
    shutil.copytree(fleet.state(NODE), fleet.state(TWIN), ignore=shutil.ignore_patterns("*.lock", "*.pid"))
    if machine_id:
        (fleet.directory / "machine-id").write_text(f"{machine_id}\n")
    began = time.monotonic()
    fleet.start_agent(TWIN)
    return began


def sessions(fleet: ProcessFleet) -> int:
    """How many agents the controller has let in."""
    log: Path = fleet.directory / "controller.log"
    return log.read_text(errors="replace").count("agent connected")


def message(fleet: ProcessFleet) -> str:
    """What the API says is wrong with the node."""
    return str(fleet.call("GET", f"/1.0/nodes/{NODE}").metadata["message"])


def refused(fleet: ProcessFleet, agent: str) -> int:
    """How often an agent was told that it is a second one."""
    return (fleet.directory / f"{agent}.log").read_text(errors="replace").count("refused (duplicate)")


def watch(fleet: ProcessFleet, report: Report, status: str) -> None:
    """The node must keep its status, and let nobody in, for a while in which both agents ask again and again."""
    before, asked = sessions(fleet), refused(fleet, NODE)
    end = time.monotonic() + WATCHED
    while time.monotonic() < end or (refused(fleet, NODE) == asked and time.monotonic() < end + ASKED_AGAIN):
        seen = fleet.node_status(NODE)
        report.check(seen == status, f"I12: the node shows {seen}, not {status}")
        time.sleep(0.2)
    report.figures["sessions while both lived"] = sessions(fleet) - before
    report.check(sessions(fleet) == before, f"I12: {sessions(fleet) - before} sessions in {WATCHED:g} s")
    report.check(refused(fleet, NODE) > asked, "the older agent did not ask: nothing was proven")


def settle(fleet: ProcessFleet, report: Report, accepted: list[str]) -> None:
    """All operations end, and none was carried out by both agents."""
    for identity in accepted:
        ended = fleet.operation(identity, 60)
        report.check(ended["status_code"] >= 200, f"I1: {identity} is {ended['status']}")
    for found in check_effects(new_effects(fleet), operations(fleet)):
        report.violation(found)


def new_effects(fleet: ProcessFleet) -> list[tuple[str, str, str, str]]:
    """The effects of both agents; what the twin's directory was copied with is counted once."""
    copied = set(fleet.effects(NODE))
    return fleet.effects(NODE) + [each for each in fleet.effects(TWIN) if (NODE, *each[1:]) not in copied]


def accept(fleet: ProcessFleet, number: int) -> list[str]:
    """Have some containers made."""
    accepted = []
    for index in range(number):
        body = {"source": {"type": "none"}, "node": NODE, "start": True}
        answer = fleet.request("POST", f"/1.0/vz/c{time.monotonic_ns()}-{index}", body)
        if answer.operation is not None:
            accepted.append(answer.operation)
    return accepted


@pytest.mark.failure("F12 on one host")
def test_the_older_of_two_agents_on_one_host_is_fenced(fleet: ProcessFleet, report: Report) -> None:
    accepted = accept(fleet, 5)
    began = start_twin(fleet)
    report.faults += 1
    until(lambda: refused(fleet, NODE), "the older agent is shut out", KNOWN_WITHIN)
    until(lambda: "second agent" in message(fleet), "the node tells of it", KNOWN_WITHIN)
    report.figures["fenced after s"] = round(time.monotonic() - began, 1)
    report.check(time.monotonic() - began <= KNOWN_WITHIN, "I12: it took more than 5 s")
    accepted += accept(fleet, 5)
    watch(fleet, report, "Online")
    settle(fleet, report, accepted)
    fleet.agents[NODE].stop()
    until(lambda: message(fleet) == "", "nothing is wrong any more", QUIET + ASKED_AGAIN)
    fleet.agents[TWIN].stop()
    fleet.start_agent(NODE)
    fleet.wait_online(NODE)


@pytest.mark.failure("F12 on two hosts")
def test_two_hosts_with_one_key_are_kept_out_until_one_ends(fleet: ProcessFleet, report: Report) -> None:
    accepted = accept(fleet, 5)
    began = start_twin(fleet, "0123456789abcdef0123456789abcdef")
    report.faults += 1
    until(lambda: fleet.node_status(NODE) == "Offline", "both are kept out", KNOWN_WITHIN)
    report.figures["kept out after s"] = round(time.monotonic() - began, 1)
    said = message(fleet)
    report.check("two agents" in said and "0123456789ab" in said, f"I12: the reason is not shown: {said!r}")
    assert fleet.request("POST", "/1.0/vz/new", {"source": {"type": "none"}, "node": NODE}).code == 503
    watch(fleet, report, "Offline")
    fleet.agents[TWIN].stop()
    fleet.wait_online(NODE, seconds=QUIET + ASKED_AGAIN + 5)
    report.check(message(fleet) == "", f"I12: {message(fleet)!r} is still said")
    accepted += accept(fleet, 5)
    assert len(accepted) == 10
    settle(fleet, report, accepted)


@pytest.mark.failure("F12 without the fence")
def test_flapping_is_caught(report: Report, fleet: ProcessFleet) -> None:
    """Without the fence the agents take turns, which the watch reports."""
    controller = fleet.controller
    assert controller is not None
    controller.stop()
    # A controller that forgets at once which agent was replaced.
    (fleet.directory / "sitecustomize.py").write_text(
        "import os, sys\n"
        "sys.path.insert(0, os.getcwd())\n"
        "import controller.dispatch.duplicates as duplicates\n"
        "duplicates.Duplicates.fenced = lambda self, hello, now: False\n"
    )
    fleet.start_controller(PYTHONPATH=str(fleet.directory))
    fleet.wait_online()
    start_twin(fleet)
    found = Report("without the fence")
    watch(fleet, found, "Online")
    report.faults += 1
    report.check(any("sessions in" in text for text in found.violations), f"not noticed: {found.violations}")
