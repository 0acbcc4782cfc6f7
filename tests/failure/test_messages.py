"""F7: every message duplicated and reordered in a window of 16, whole earlier sessions replayed, in both directions."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import agent.executor
import controller.app
from agent.admission import Answer, Refuse, Run
from tests.failure.invariants import Found, check_effects, check_ends, check_one_place, check_same
from tests.failure.report import Report
from tests.failure.unruly import Unruly
from tests.helpers.cluster import Cluster, cluster, until

SHORT, LONG = 400, 10_000
"""Operations."""
WORKERS = 16
BREAK_EVERY = 0.7
NODES = ("node1", "node2")
EFFECTS = {
    "create": [("create/do", "container.create"), ("start/do", "container.start")],
    "stop": [("stop/do", "container.stop")],
    "start": [("start/do", "container.start")],
}
"""What an operation must have done when it says Success: step and driver's command."""


@asynccontextmanager
async def unruly_fleet(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Cluster, Unruly]]:
    """A controller and two agents with an unruly network between them."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    monkeypatch.setattr(Unruly, "choice", random.Random(seed))
    monkeypatch.setattr(controller.app, "Router", Unruly)
    async with cluster(directory, nodes=len(NODES)) as fleet:
        assert Unruly.made is not None
        yield fleet, Unruly.made


class Load:
    """Operations on many containers at once; `accepted` are those answered with 202, `expected` what they stand for."""

    def __init__(self, fleet: Cluster, most: int) -> None:
        self.fleet = fleet
        self.accepted: list[str] = []
        self.expected: dict[str, list[tuple[str, str]]] = {}
        self._left = most

    async def run(self) -> None:
        """Until so many operations have ended."""
        async with asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                group.create_task(self._work(number))

    async def _work(self, worker: int) -> None:
        for turn in itertools.count():
            path = f"/1.0/vz/w{worker}-{turn}"
            body = {"source": {"type": "none"}, "node": NODES[turn % 2], "start": True}
            await self._do("create", "POST", path, body)
            await self._do("stop", "PUT", f"{path}/state", {"action": "stop"})
            await self._do("start", "PUT", f"{path}/state", {"action": "start"})
            if self._left <= 0:
                return
            if turn % 3:
                await self._do("delete", "DELETE", f"{path}?force=1")

    async def _do(self, what: str, method: str, path: str, body: Any = None) -> None:
        """One operation, followed to its end. While a node is being let in anew it is asked again."""

        async def asked() -> Any:
            answer = await self.fleet.request(method, path, body)
            assert answer.status_code in (202, 503), answer.text
            return answer.json() if answer.status_code == 202 else None

        answer = await until(asked, f"{method} {path} is accepted")
        identity = answer["operation"].rpartition("/")[2]
        self.accepted.append(identity)
        self.expected[identity] = EFFECTS.get(what, [])
        self._left -= 1
        ended = await self.fleet.call("GET", f"{answer['operation']}/wait?timeout=60")
        assert ended["metadata"]["status"] == "Success", ended


async def break_sessions(fleet: Cluster, network: Unruly, report: Report) -> None:
    """End sessions for ever, and say each again on the connection that follows it."""
    keys = {node: fleet.app.dispatcher._peers[node].key for node in NODES}
    for node in itertools.cycle(NODES):
        await asyncio.sleep(BREAK_EVERY)
        old = network.latest(keys[node])
        fleet.app.dispatcher._peers[node].link.end("ended by a test")
        report.faults += 1
        await until(lambda node=node, old=old: network.latest(keys[node]) is not old, f"{node} comes back")
        network.replay(old, network.latest(keys[node]))


async def run_load(fleet: Cluster, network: Unruly, report: Report, most: int) -> Load:
    """Operations in such a network; afterwards it is calm."""
    load = Load(fleet, most)
    breaking = asyncio.create_task(break_sessions(fleet, network, report))
    try:
        await load.run()
    finally:
        breaking.cancel()
        await asyncio.gather(breaking, return_exceptions=True)
        network.calm = True
    return load


async def violations(fleet: Cluster, load: Load) -> Found:
    """I1, I2, I3 and I5."""
    known = await operations(fleet)
    found = check_ends(load.accepted, known) + check_effects(effects(fleet), known, load.expected)
    same: Found = []

    async def agrees() -> bool:
        same[:] = check_same(await shown(fleet), worlds(fleet))
        return not same

    try:
        await until(agrees, "the API says what the nodes have", 10)
    except AssertionError:
        found += same
    return found + check_one_place(worlds(fleet))


async def operations(fleet: Cluster) -> dict[str, dict[str, Any]]:
    """All operations that the API knows."""
    found: dict[str, dict[str, Any]] = {}
    cursor = ""
    while True:
        groups = (await fleet.call("GET", f"/1.0/operations?recursion=1&limit=1000{cursor}"))["metadata"]
        page = {str(each["id"]): each for group in groups.values() for each in group}
        found |= page
        if len(page) < 1000:
            return found
        cursor = f"&cursor={min(page)}"


async def shown(fleet: Cluster) -> dict[str, dict[str, Any]]:
    """All containers as the API shows them."""
    views = (await fleet.call("GET", "/1.0/vz?recursion=1"))["metadata"]
    return {view["id"]: {**view, "snapshots": []} for view in views}


def worlds(fleet: Cluster) -> dict[str, Any]:
    """What the nodes have."""
    return {node: json.loads((fleet.directory / node / "fake" / "world.json").read_bytes()) for node in NODES}


def effects(fleet: Cluster) -> list[tuple[str, str, str, str]]:
    """What the drivers did: node, command, container, id of the agent's command."""
    found = []
    for node in NODES:
        file = fleet.directory / node / "fake" / "effects"
        for line in file.read_text().splitlines() if file.exists() else []:
            command, container, identity = line.split()
            found.append((node, command, container, identity))
    return found


@pytest.mark.failure("F7")
async def test_duplicated_reordered_and_replayed_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report, long_run: bool
) -> None:
    async with unruly_fleet(tmp_path, monkeypatch) as (fleet, network):
        load = await run_load(fleet, network, report, LONG if long_run else SHORT)
        for found in await violations(fleet, load):
            report.violation(found)
        report.faults += sum(network.counts.values())
        report.figures |= {"operations": len(load.accepted), **network.counts}
        assert min(network.counts[what] for what in ("duplicated", "reordered", "sessions replayed")) > 0


@pytest.mark.failure("F7 without a journal")
async def test_an_agent_without_its_journal_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    """One that runs whatever comes does once more what was asked for before."""
    decide = agent.executor.decide

    def runs_all(*arguments: Any) -> Any:
        decision = decide(*arguments)
        return Run(again=True) if isinstance(decision, Answer | Refuse) else decision

    monkeypatch.setattr(agent.executor, "decide", runs_all)
    async with unruly_fleet(tmp_path, monkeypatch) as (fleet, network):
        load = Load(fleet, 3)
        await load._do("create", "POST", "/1.0/vz/c", {"source": {"type": "none"}, "node": "node1", "start": True})
        await load._do("stop", "PUT", "/1.0/vz/c/state", {"action": "stop"})
        said = network.latest(fleet.app.dispatcher._peers["node1"].key)
        assert not check_effects(effects(fleet), {})

        def done_again() -> Found:
            network.replay(said, said)
            report.faults += 1
            return check_effects(effects(fleet), {})

        await until(done_again, "the start has an effect again")
