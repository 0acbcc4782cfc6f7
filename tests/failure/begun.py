"""What agents begin to carry out, written down by the agents themselves: was it still allowed to begin?

A hook of Python's start (sitecustomize) in the agent's process sees each command between its admission and its
journal, and notes how long it was still good. The admission itself is not asked. On `HANG` the agent stands still for
`HUNG` seconds, while libzmq's own thread goes on to take in what comes.
"""

from __future__ import annotations

import json
import signal

from tests.failure.fleet import ProcessFleet
from tests.failure.invariants import Found

HANG = signal.SIGUSR1
HUNG = 12.0
"""Longer than a command may wait for its begin (LinkSettings.begin_within)."""
_HOOK = """
import os, sys
sys.path.insert(0, os.getcwd())
import json, signal, time, agent.journal, agent.executor, agent.admission
from common.clock import SystemClock



begin = agent.journal.Journal.begin
decide = agent.executor.decide

async def watched(self, command):
    entry = {"command": command.id, "left": command.expires_at - SystemClock().monotonic(), "epoch": command.epoch,
             "seen": self.epoch, "generation": command.generation, "highest": self.generations.get(
                 agent.admission.target_of(command.arguments), 0)}
    with open(os.environ["VZFLEET_BEGUN"], "a") as file:
        file.write(json.dumps(entry) + chr(10))
    await begin(self, command)

def believes_all(command, record, fences, now):
    if record is not None and record.result is not None:
        return decide(command, record, fences, now)
    return agent.admission.Run(again=record is not None)

signal.signal(signal.SIGUSR1, lambda *_: time.sleep(float(os.environ["VZFLEET_HUNG"])))
agent.journal.Journal.begin = watched
if os.environ.get("VZFLEET_BELIEVES_ALL"):
    agent.executor.decide = believes_all
"""
SLACK = 0.5
"""Seconds between the admission and our look at the clock, on a busy machine."""


class Begun:
    """The notes of a fleet's agents."""

    def __init__(self, fleet: ProcessFleet) -> None:
        self._directory = fleet.directory / "begun"
        self._directory.mkdir()
        (self._directory / "sitecustomize.py").write_text(_HOOK)

    def environment(self, node: str, believes_all: bool = False) -> dict[str, str]:
        """For the agent of a node: notes are taken; with `believes_all` it runs all but what it has done already."""
        found = {
            "PYTHONPATH": str(self._directory),
            "VZFLEET_BEGUN": str(self._directory / node),
            "VZFLEET_HUNG": str(HUNG),
        }
        return {**found, "VZFLEET_BELIEVES_ALL": "1"} if believes_all else found

    def entries(self) -> list[dict[str, float]]:
        """One for each time that a command was begun."""
        files = [file for file in self._directory.iterdir() if file.suffix != ".py" and file.is_file()]
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def violations(self) -> Found:
        """What was begun although it had expired, or was of an older epoch or generation."""
        found = []
        for entry in self.entries():
            if entry["left"] < -SLACK:
                found.append(f"F5: {entry['command']} was begun {-entry['left']:.1f} s after it had expired")
            if entry["epoch"] < entry["seen"]:
                found.append(f"F5: {entry['command']} of epoch {entry['epoch']} was begun, {entry['seen']} was seen")
            if entry["generation"] < entry["highest"]:
                found.append(f"F5: {entry['command']} of generation {entry['generation']} was begun")
        return found
