"""F2 on real containers: an agent is killed at random moments while it makes and starts LXC containers."""

from __future__ import annotations

import os
import random
import secrets
import select
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.failure.report import Report
from tests.helpers.real_fleet import BUSYBOX, RealFleet, quickstart, real_fleet, until

pytestmark = [pytest.mark.failure("F2 on LXC"), pytest.mark.lxc]
SHORT, LONG = 4, 20
LONGEST = 0.4
"""Seconds within which a creation is over: the kill comes at any moment of that time."""
NODE = "node1"


@pytest.fixture
def fleet() -> Iterator[RealFleet]:
    """One node, on which the image is unpacked already."""
    with real_fleet(nodes=1) as made:
        made.delete(made.new())
        yield made


class Host:
    """What root sees of the node's containers on the machine."""

    def __init__(self, fleet: RealFleet) -> None:
        self.state = fleet.agent_state(NODE)
        self._namespace = Path(f"/proc/{fleet.pid(f'agent-{NODE}')}/ns/net").readlink()

    def things(self) -> set[str]:
        """Directories of containers, mounts, interfaces and control groups: each container has its own."""
        found = {f"{where}/{path.name}" for where in ("pool/containers", "lxc") for path in self._list(where)}
        found |= {line.split()[4] for line in _lines("/proc/self/mountinfo") if str(self.state) in line}
        found |= {f"interface {name}" for name in self._interfaces()}
        return found | {f"process {pid}" for pid in self._monitors()}

    def _list(self, where: str) -> list[Path]:
        directory = self.state / where
        return list(directory.iterdir()) if directory.is_dir() else []

    def _interfaces(self) -> list[str]:
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _namespace(process) == self._namespace:
                enter = ["nsenter", f"--net={process}/ns/net", "ip", "-o", "link"]
                shown = subprocess.run(enter, capture_output=True, text=True, check=True, timeout=10).stdout
                return [line.split()[1].partition("@")[0].rstrip(":") for line in shown.splitlines()]
        raise AssertionError("nothing runs in the node's network namespace")

    def _monitors(self) -> list[str]:
        """The processes by which LXC holds this node's containers."""
        mark = str(self.state / "lxc").encode()
        pids = (process for process in Path("/proc").iterdir() if process.name.isdigit())
        return [process.name for process in pids if mark in _bytes(process / "cmdline")]


def _namespace(process: Path) -> Path | None:
    try:
        return (process / "ns/net").readlink()
    except OSError:
        return None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def kill(pid: int) -> None:
    """`kill -9`, and wait until the process is gone."""
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert select.select([handle], [], [], 10)[0], f"process {pid} does not end"
    finally:
        os.close(handle)


def killed_while_creating(fleet: RealFleet, delay: float) -> tuple[str, dict[str, Any]]:
    """A new container whose agent was killed that many seconds after it was asked for; how its operation ended."""
    container = f"k-{secrets.token_hex(4)}"
    pid = fleet.pid(f"agent-{NODE}")
    code, answer = fleet.request("POST", f"/1.0/vz/{container}", {"source": BUSYBOX, "start": True})
    assert code == 202, answer
    time.sleep(delay)
    kill(pid)
    quickstart("--state", str(fleet.state), "--no-demo")
    ended: dict[str, Any] = fleet.get(f"{answer['operation']}/wait?timeout=90")
    return container, ended


def check_journal(fleet: RealFleet, operations: list[str]) -> list[str]:
    """Every command of these operations was finished, and each that made a container stands there once."""
    with closing(sqlite3.connect(f"file:{fleet.agent_state(NODE)}/journal.db?mode=ro", uri=True)) as database:
        rows = dict(database.execute("SELECT id, result IS NOT NULL FROM commands"))
    found = [f"I4: {command} was never finished" for command, finished in rows.items() if not finished]
    return found + [f"I4: {each} is not in the journal" for each in operations if f"{each}/create/do" not in rows]


def test_killed_while_containers_are_made(fleet: RealFleet, report: Report, long_run: bool) -> None:
    seed = int(os.environ.get("VZFLEET_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    chance = random.Random(seed)
    host = Host(fleet)
    before = host.things()
    created, operations = [], []
    for _ in range(LONG if long_run else SHORT):
        container, ended = killed_while_creating(fleet, chance.uniform(0.0, LONGEST))
        report.faults += 1
        created.append(container)
        operations.append(str(ended["id"]))
        report.check(ended["status"] == "Success", f"I1: {ended['status']}: {ended['err']}")
        if ended["status"] == "Success":
            shown = fleet.show(container)["status"]["status"]
            report.check(shown == "Running", f"I5: {container} is shown as {shown}")
            inside = fleet.inside(container, "hostname", check=False).stdout.strip()
            report.check(inside == container, f"I5: {container} does not run: {inside!r}")
    for found in check_journal(fleet, operations):
        report.violation(found)
    names = {path.name for path in (host.state / "lxc").iterdir()}
    report.check(names == set(created), f"I6: {names ^ set(created)} beside the {len(created)} containers")
    report.figures["containers that run"] = len(created)
    assert len(host.things() - before) > 3 * len(created), (
        "a container is a directory, a mount, an interface, a process"
    )
    fleet.delete(*created)
    until(lambda: host.things() == before, f"nothing is left: {host.things() ^ before}")
