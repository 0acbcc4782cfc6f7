"""Does the controller stall when the snapshots of a whole fleet fall due at one moment: 5,000 @hourly on 500 hosts.

    python tests/bench/schedules.py [--hosts N] [--each N] [--agents PROCESSES]

A real controller in this process, real agents with the fake driver in others; sockets, CURVE and SQLite are real. The
controller's clock is moved to the next full hour. Prints how long it took until the last one was taken, how late the
event loop came to what was due (in rest and meanwhile), and how many commits there were.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from agent.app import Agent
from agent.config import AgentConfig, encode
from agent.config import load as load_agent
from agent.drivers.fake_state import FakeContainer, FakeWorld, save_world
from agent.identity import read_boot_id
from common import keys
from common.clock import SystemClock, timestamp
from common.reports import ContainerSpec
from common.states import NodeStatus, Status
from controller.app import App, prepare_state
from controller.records import Container, Node, Phase, Power
from controller.services.identities import new_token
from controller.settings import ControllerSettings
from controller.store import containers, counters, nodes, schema, tokens
from controller.store.db import Transaction
from tests.helpers.cluster import free_port, until

CONFIG = {"snapshots.schedule": "@hourly", "snapshots.expiry": "2d", "limits.memory": "10MB"}
LOOK = 0.01


class MovedClock(SystemClock):
    """The machine's clock, moved on by `ahead`."""

    ahead = timedelta()

    def now(self) -> datetime:
        return super().now() + self.ahead


# ---------------------------------------------------------------- the agents


async def run_agents(directory: Path, first: int, last: int) -> None:
    """The agents of some hosts, until this process is ended."""
    stop = asyncio.Event()
    agents = [Agent(load_agent(directory / f"node{number}" / "agent.json")) for number in range(first, last)]
    await asyncio.gather(*(agent.run(stop) for agent in agents))


def start_agents(directory: Path, bounds: list[str]) -> subprocess.Popen[bytes]:
    """A process with the agents of some hosts."""
    return subprocess.Popen([sys.executable, __file__, "--run", str(directory), *bounds])


def enrol(directory: Path, settings: ControllerSettings, name: str, specs: list[ContainerSpec]) -> Node:
    """A host's files as after a join, with containers that run; its row."""
    state = directory / name
    (state / "fake").mkdir(parents=True)
    pair = keys.load_or_create(state / "agent.key")
    shutil.copy(settings.state / "tls" / "ca.crt", state / "ca.crt")
    keys.write_private(state / "controller.pub", keys.load(settings.state / "link.key").public + "\n")
    config = AgentConfig(
        state=state,
        node=name,
        controller=f"tcp://127.0.0.1:{settings.agent_port}",
        api=f"https://127.0.0.1:{settings.port}",
        driver="fake",
    )
    keys.write_private(state / "agent.json", encode(config))
    running = {spec.id: FakeContainer(spec, Status.RUNNING, "content", time.time()) for spec in specs}
    save_world(state / "fake" / "world.json", FakeWorld(boot_id=read_boot_id(), containers=running))
    return Node(name, pair.public, timestamp(datetime.now(UTC)))


# ---------------------------------------------------------------- the controller


async def fill(app: App, directory: Path, hosts: int, each: int) -> None:
    """Rows and files of the whole fleet."""
    made: list[tuple[Node, list[Container]]] = []
    for host in range(hosts):
        specs = [
            ContainerSpec(
                f"c{host}-{number}",
                host * each + number + 1,
                "web",
                f"00:16:3e:{host >> 8:02x}:{host & 255:02x}:{number:02x}",
                CONFIG,
            )
            for number in range(each)
        ]
        node = enrol(directory, app.settings, f"node{host}", specs)
        rows = [
            Container(
                spec.id,
                node.name,
                spec.generation,
                spec.hostname,
                "",
                dict(spec.config),
                None,
                spec.hwaddr,
                node.added_at,
                Phase.READY,
                power=Power.RUNNING,
            )
            for spec in specs
        ]
        made.append((node, rows))

    def write(transaction: Transaction) -> None:
        for node, rows in made:
            nodes.rows.insert(transaction, node)
            for row in rows:
                containers.rows.insert(transaction, row)
        counters.raise_to(transaction, "generation", hosts * each + 1)

    await app.store.write(write)
    for node, _ in made:
        app.dispatcher.enrol(node.name, node.public_key)


class LoopDelay:
    """How late the event loop comes back to a task that sleeps, in milliseconds."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(LOOK)
            self.delays.append((time.perf_counter() - begun - LOOK) * 1000)

    def end(self) -> str:
        """Stop, and say it in words."""
        self._task.cancel()
        cuts = statistics.quantiles(self.delays, n=100)
        return f"median {cuts[49]:.1f} ms, 99 % {cuts[98]:.1f} ms, worst {max(self.delays):.0f} ms"


async def reads(client: httpx.AsyncClient, over: asyncio.Event) -> list[float]:
    """Milliseconds of GETs of one container, one after the other."""
    times = []
    while not over.is_set():
        begun = time.perf_counter()
        response = await client.get("/1.0/vz/c0-0")
        assert response.status_code == 200
        times.append((time.perf_counter() - begun) * 1000)
        await asyncio.sleep(0.05)
    return times


def snapshots_of(app: App) -> int:
    """How many were taken by schedule."""
    return sum(len(live.snapshots) for live in app.fleet.containers.values())


async def measure(app: App, clock: MovedClock, client: httpx.AsyncClient, wanted: int) -> None:
    """Rest, then the full hour, and what it took."""
    rest = LoopDelay()
    await asyncio.sleep(10)
    print(f"in rest      loop late: {rest.end()}")
    over, before = asyncio.Event(), app.store.commits
    delay, reading = LoopDelay(), asyncio.ensure_future(reads(client, over))
    now = clock.now()
    clock.ahead += now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1, seconds=1) - now
    begun = time.monotonic()
    await until(lambda: snapshots_of(app) == wanted and not app.schedules.busy, "all are taken", 600)
    took, taken = time.monotonic() - begun, snapshots_of(app)
    over.set()
    times = await reading
    print(f"at the hour  loop late: {delay.end()}")
    print(f"{taken} of {wanted} snapshots in {took:.1f} s, {app.store.commits - before} commits")
    print(f"GET of a container meanwhile: median {statistics.median(times):.1f} ms, worst {max(times):.0f} ms")


async def run(directory: Path, options: argparse.Namespace) -> None:
    """The whole of it in `directory`."""
    settings = ControllerSettings(
        state=directory / "controller",
        host="127.0.0.1",
        port=free_port(),
        agent_port=free_port(),
        addresses=("127.0.0.1",),
        log_level="error",
    )
    prepare_state(settings)
    schema.upgrade(settings.url)
    clock = MovedClock()
    app = App(settings, clock)
    await app.start()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        await fill(app, directory, options.hosts, options.each)
        text, token = new_token("bench", "admin", SystemClock())
        await app.store.write(lambda transaction: tokens.rows.insert(transaction, token))
        share = -(-options.hosts // options.agents)
        for first in range(0, options.hosts, share):
            bounds = [str(first), str(min(first + share, options.hosts))]
            processes.append(start_agents(directory, bounds))
        hosts = app.fleet.nodes.values()
        await until(lambda: all(node.status is NodeStatus.ONLINE for node in hosts), "all hosts are there", 180)
        print(f"{len(hosts)} hosts, {len(app.fleet.containers)} containers")
        context = ssl.create_default_context(cafile=str(settings.state / "tls" / "ca.crt"))
        headers = {"Authorization": f"Bearer {text}"}
        url = f"https://127.0.0.1:{settings.port}"
        async with httpx.AsyncClient(base_url=url, verify=context, headers=headers, trust_env=False) as client:
            await measure(app, clock, client, options.hosts * options.each)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        await app.stop()


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=500, help="default %(default)s")
    parser.add_argument("--each", type=int, default=10, help="containers of a host (default %(default)s)")
    parser.add_argument("--agents", type=int, default=2, help="processes with agents (default %(default)s)")
    parser.add_argument("--run", nargs=3, metavar=("DIRECTORY", "FIRST", "LAST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        directory, first, last = options.run
        asyncio.run(run_agents(Path(directory), int(first), int(last)))
        return
    directory = Path(tempfile.gettempdir()) / f"vzt-{secrets.token_hex(4)}"
    directory.mkdir(mode=0o700)
    try:
        asyncio.run(run(directory, options))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
