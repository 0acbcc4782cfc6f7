"""One simulation from its seed: hosts, controller, clients and faults; then everything heals and must come right."""

from __future__ import annotations

import asyncio
import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.clock import timestamp
from common.errors import VzfleetError
from controller.records import Image, Node, Operation
from controller.store import images as image_rows
from controller.store import nodes as node_rows
from controller.store.db import Transaction
from tests.failure.simulation import faults, requests
from tests.failure.simulation.controller import Controller, simulated_controller
from tests.failure.simulation.host import Host, simulated_hosts
from tests.failure.simulation.invariants import Invariants
from tests.failure.simulation.loop import VirtualClock, VirtualLoop, virtual_world
from tests.failure.simulation.network import Network
from tests.failure.simulation.trace import Trace

HEALED_WITHIN = 10.0
"""Seconds from healing until what the API says is what the nodes have."""
ENDED_WITHIN = 60.0
"""Seconds from healing until every operation has ended."""
POLL = 0.25
IMPATIENT = 0.25
"""How probably a client cancels after some seconds what has not ended then."""


@dataclass
class Outcome:
    """What came of a seed. `digest` is the hash of its trace."""

    seed: int
    digest: str = ""
    violations: list[str] = field(default_factory=list)
    faults: int = 0
    accepted: int = 0
    refused: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    left_behind: int = 0
    virtual_seconds: float = 0.0
    settled_after: float = 0.0

    def describe(self) -> str:
        """The violations, and how to see them again."""
        shown = "\n  ".join(self.violations[:10])
        return f"seed {self.seed}: python -m tests.failure.simulation --seed {self.seed} --trace\n  {shown}"


class World:
    """Everything in one simulation."""

    def __init__(self, seed: int, loop: VirtualLoop, state: Path, show: Callable[[str], None] | None) -> None:
        self.chance = random.Random(f"{seed}/world")
        self.loop = loop
        self.trace = Trace(loop.time, show)
        self.network = Network(loop, seed, self.trace)
        self.controller = Controller(state, seed, self.network, self.trace, VirtualClock(loop))
        self.hosts: dict[str, Host] = {}
        for number in range(self.chance.randint(3, 5)):
            clock = VirtualClock(loop, self.chance.uniform(10, 1e6), 1 + self.chance.uniform(-1e-4, 1e-4))
            clock.skew = self.chance.choice((0.0, 0.0, 0.0, 3600.0, -86400.0))
            name = f"n{number + 1}"
            self.hosts[name] = Host(name, state, seed, self.network, self.trace, clock)
        self.invariants = Invariants(self.controller, self.hosts, self.trace)
        self.outcome = Outcome(seed)
        self._faults = faults.Running()
        self._impatient: list[asyncio.Task[None]] = []

    def any_host(self, chance: random.Random) -> Host:
        """One of the hosts."""
        return self.hosts[chance.choice(sorted(self.hosts))]

    async def run(self) -> Outcome:
        """The whole life of this world."""
        self._install()
        self.controller.start()
        for host in self.hosts.values():
            host.start()
        await asyncio.sleep(3)
        length = self.chance.uniform(10, 30)
        asking = asyncio.ensure_future(self._clients(length))
        breaking = asyncio.ensure_future(self._break(length))
        await asyncio.gather(asking, breaking)
        await self._heal()
        return await self._judge()

    def _install(self) -> None:
        """The rows that are there before: enrolled nodes, an image."""
        now = timestamp(self.controller.clock.now())
        transaction = Transaction(self.controller.disk.connection)
        for host in self.hosts.values():
            node_rows.rows.insert(transaction, Node(host.name, host.key, now))
        image_rows.rows.insert(transaction, Image(requests.FINGERPRINT, "rootfs", 10, {}, (), "", "image.tar", now))
        transaction.connection.commit()

    # ------------------------------------------------------------ clients

    async def _clients(self, length: float) -> None:
        number = self.chance.randint(20, 60)
        moments = sorted(self.chance.uniform(0, length) for _ in range(number))
        before = 0.0
        answers = []
        for moment in moments:
            await asyncio.sleep(moment - before)
            before = moment
            answers.append(asyncio.ensure_future(self._ask(requests.choose(self.chance))))
        await asyncio.wait(answers, timeout=30)

    async def _ask(self, request: requests.Request) -> None:
        chance = random.Random(self.chance.getrandbits(64))

        async def work(services: Any) -> Any:
            return await request.ask(requests.Asking(services, chance))

        answering = self.controller.ask(work)
        if answering is None:
            self.trace.note("client", f"{request.name}: nobody answers")
            return
        await asyncio.wait({answering})
        error = asyncio.CancelledError() if answering.cancelled() else answering.exception()
        if error is None:
            self._note_answer(request, answering.result())
        else:
            self._note_error(request, error)

    def _note_error(self, request: requests.Request, error: BaseException) -> None:
        self.trace.note("client", f"{request.name}: {error!r}")
        self.outcome.refused += 1
        if isinstance(error, Exception) and not isinstance(error, VzfleetError):
            self.invariants.violation(f"the request {request.name} met a fault: {error!r}")

    def _note_answer(self, request: requests.Request, operation: Operation | None) -> None:
        self.trace.note("client", f"{request.name}: {operation.id if operation else 'done'}")
        if operation is not None:
            self.outcome.accepted += 1
            self.invariants.accept(operation.id)
            if self.chance.random() < IMPATIENT:
                self.loop.call_later(self.chance.uniform(0.2, 8.0), self._lose_patience, operation.id)

    def _lose_patience(self, operation: str) -> None:
        async def cancel(asking: requests.Asking) -> None:
            await asking.services.operations.cancel(operation)

        self._impatient.append(asyncio.ensure_future(self._ask(requests.Request("cancel late", 0, cancel))))

    # ------------------------------------------------------------ faults

    async def _break(self, length: float) -> None:
        number = self.chance.randint(2, 8)
        for moment in sorted(self.chance.uniform(0, length) for _ in range(number)):
            self.loop.call_later(moment, self._begin_fault, faults.choose(self.chance))
        await asyncio.sleep(length)

    def _begin_fault(self, fault: faults.Fault) -> None:
        self.trace.note("fault", fault.name)
        self.outcome.faults += 1
        running = self._faults.begin(fault.begin(self, self.chance))
        if fault.longest:
            self.loop.call_later(self.chance.uniform(0.1, fault.longest), self._faults.end, running)

    # ------------------------------------------------------------ healing

    async def _heal(self) -> None:
        self.trace.note("fault", "everything heals")
        self._faults.end_all()
        self.controller.die_at = 0
        self.controller.start()
        for host in self.hosts.values():
            host.die_at = 0
            host.start()

    async def _judge(self) -> Outcome:
        healed = self.loop.time()
        in_time = await self._until(self.invariants.in_sight, HEALED_WITHIN)
        if not in_time:
            self.invariants.violation(f"I5 not within {HEALED_WITHIN:g} s: {self.invariants.not_in_sight()}")
        if not await self._until(self.invariants.all_ended, ENDED_WITHIN):
            self.invariants.violation(f"I1 not ended within {ENDED_WITHIN:g} s: {self.invariants.unfinished()}")
        await self._until(self.invariants.in_sight, HEALED_WITHIN)
        # A result whose acknowledgement was lost is told again in the next session, and only then.
        for host in self.invariants.unacknowledged_hosts():
            self.network.sever_host(host)
        await self._until(self.invariants.settled, HEALED_WITHIN)
        self.outcome.settled_after = self.loop.time() - healed
        for fault in self.loop.faults:
            self.invariants.fault(fault)
        self.invariants.check_end()
        self.outcome.violations = self.invariants.violations
        self.outcome.ended = dict(self.invariants.ended)
        self.outcome.left_behind = len(self.invariants.excused)
        self.outcome.virtual_seconds = self.loop.time()
        self.outcome.digest = self.trace.digest
        return self.outcome

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        end = self.loop.time() + seconds
        while not condition():
            if self.loop.time() >= end:
                return False
            await asyncio.sleep(POLL)
        return True


@contextmanager
def _silence() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _state_directory() -> Iterator[Path]:
    """The files that every enrolled agent has, and the controller's directory of images."""
    with tempfile.TemporaryDirectory(prefix="vz-simulation-") as name:
        for file in ("ca.crt", "controller.pub"):
            (Path(name) / file).touch()
        yield Path(name)


def simulate(seed: int, show: Callable[[str], None] | None = None) -> Outcome:
    """Run one seed to its end."""
    with _silence(), _state_directory() as state, virtual_world(seed) as loop:
        world = World(seed, loop, state, show)
        with simulated_hosts(world.network), simulated_controller(world.network):
            return loop.run_until_complete(world.run())
