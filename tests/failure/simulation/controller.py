"""The controller, which may die and come back: the real application without its sockets, on a disk that survives it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from common.errors import VzfleetError
from controller import app as controller_app
from controller.api.services import Services
from controller.app import App
from controller.identifiers import operation_ids
from controller.records import Change, Event, Operation
from controller.settings import ControllerSettings
from controller.store import db, health, schema
from tests.failure.simulation.disks import SimulatedDatabase, StoreDisk
from tests.failure.simulation.loop import Crash, Process, VirtualClock, this_process
from tests.failure.simulation.network import Network, Server
from tests.failure.simulation.trace import Trace

RESTART_DELAY = 1.0
OnCommit = Callable[[Sequence[Change]], None]


class _App(App):
    """The application; what its API would serve is kept for clients of the simulation."""

    served: Services | None = None

    def _serve(self, services: Services, tls: object) -> None:
        self.served = services


class Controller:
    """The fleet's controller."""

    def __init__(self, state: Path, seed: int, network: Network, trace: Trace, clock: VirtualClock) -> None:
        self.clock = clock
        self.disk = StoreDisk(seed)
        self.network = network
        self.process: Process | None = None
        self.app: _App | None = None
        self.faults: list[BaseException] = []
        """What its lives failed with by themselves."""
        self.die_at = 0
        """At how many more points (of those named in the code, and after commits) it dies; 0: it does not."""
        self.on_commit: OnCommit = lambda _: None
        self._settings = ControllerSettings(state=state, sample_interval=20.0)
        self._trace = trace

    @property
    def alive(self) -> bool:
        """Whether it runs; it may be still starting."""
        return self.process is not None and not self.process.dead

    @property
    def services(self) -> Services | None:
        """What it serves; None while nobody listens."""
        return self.app.served if self.alive and self.app is not None else None

    def start(self) -> None:
        """Start it, if it does not run."""
        if self.alive:
            return
        self._trace.note("process", "controller starts")
        self.process = Process("controller", self)
        self.process.on_death.append(self._died)
        self.process.run(self._live())

    def kill(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.kill()

    async def _live(self) -> None:
        # A new process has given no ids yet.
        operation_ids._last = 0
        app = _App(self._settings, self.clock)
        try:
            await app.start()
        except VzfleetError as error:
            # Its supervisor starts it again (`Restart=always`).
            self._trace.note("process", f"controller cannot start: {error.text}")
            asyncio.get_running_loop().call_later(RESTART_DELAY, self.start)
            self.kill()
            return
        self.app = app

    def ask(self, work: Callable[[Services], Awaitable[Any]]) -> asyncio.Task[Any] | None:
        """A request to it: dies with it. None when nobody listens."""
        services, process = self.services, self.process
        if services is None or process is None:
            return None

        async def answer() -> Any:
            return await work(services)

        return process.start(answer())

    def _died(self) -> None:
        if self.process is not None and self.process.fault is not None:
            self.faults.append(self.process.fault)
        self._trace.note("process", "controller died")
        self.app = None
        if self.network.server is not None:
            self.network.unserve(self.network.server)

    def committed(self, changes: Sequence[Change]) -> None:
        """What a transaction changed, before anybody hears of it."""
        for change in changes:
            record = change.record
            if change.kind is Event:
                continue
            if isinstance(record, Operation):
                where = f"{'undo' if record.undoing else 'do'} {record.position}"
                self._trace.note("operation", f"{record.id} {record.kind} {record.status.name} {where} {record.error}")
            else:
                self._trace.note("row", f"{change.kind.__name__} {change.key} {record}")
        self.on_commit(changes)

    def reach(self, point: str) -> None:
        """A point at which it may die."""
        process = this_process()
        process.check()
        if self._counts():
            self._trace.note("fault", f"controller dies at {point}")
            process.kill()
            raise Crash(point)

    def durable(self) -> None:
        """A commit is durable, and nobody has heard of it: it may die here."""
        if self._counts():
            self._trace.note("fault", "controller dies after a commit")
            self.kill()

    def _counts(self) -> bool:
        self.die_at = max(-1, self.die_at - 1)
        return self.die_at == 0


@contextmanager
def simulated_controller(network: Network) -> Iterator[None]:
    """Have the parts that touch the machine replaced: database file and thread, TLS, the ROUTER socket."""

    def database(_url: str, on_commit: Any, _mark: object, *more: Any, **named: Any) -> SimulatedDatabase:
        process = this_process()
        controller: Controller = process.owner

        def committed(changes: Sequence[Change]) -> None:
            controller.committed(changes)
            on_commit(changes)

        store = SimulatedDatabase(controller.disk, process, committed, *more, **named)
        store.durable = controller.durable
        return store

    certificates = SimpleNamespace(fingerprint="", ca=mock.Mock(read_text=lambda **_: ""), server_context=lambda: None)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(db, "make_engine"))
        stack.enter_context(mock.patch.object(schema, "check"))
        stack.enter_context(mock.patch.object(health, "examine", return_value=None))
        stack.enter_context(
            mock.patch.multiple(
                controller_app,
                Database=database,
                Router=lambda *_: Server(network, this_process()),
                prepare_state=lambda _settings: certificates,
                from_environment=lambda: this_process().owner.reach,
            )
        )
        yield
