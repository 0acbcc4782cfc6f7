"""A controller and agents as real processes on loopback, each to be killed and started again at any moment.

Agents run the fake driver, whose world and count of effects stand in files. What a fleet needs on disk is in one
directory below /var/tmp, which is gone when the fleet is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from agent import enrolment
from agent.config import AgentConfig
from common.clock import SystemClock
from controller import settings as settings_module
from controller.app import prepare_state
from controller.services.identities import new_token
from controller.settings import ControllerSettings
from controller.store import schema
from controller.store import tokens as token_rows
from controller.store.db import Database
from tests.failure.processes import Process, until
from tests.helpers.cluster import free_port
from tests.helpers.streams import Streams, streams_server

FAILPOINT = "VZFLEET_FAILPOINT"
QUICK: dict[str, Any] = {
    "heartbeat_interval": 0.25,
    "heartbeat_timeout": 5.0,
    "sample_interval": 1.0,
    "image_servers": {},
    "image_index_lifetime": 0.001,
}
START_TIME = 30.0
Launcher = Callable[[str], Sequence[str]]
"""From a node's name to what stands before its agent's command, as `nsenter --net=/run/netns/x --`."""


@dataclass(frozen=True)
class Answer:
    """A REST answer: its code and envelope. `code` 0: the connection broke, and nobody knows what happened."""

    code: int
    envelope: dict[str, Any] = field(default_factory=dict)

    @property
    def operation(self) -> str | None:
        """The id of the operation that was accepted."""
        return str(self.envelope["operation"]).rpartition("/")[2] if self.code == 202 else None

    @property
    def metadata(self) -> Any:
        """What was asked for."""
        return self.envelope.get("metadata")


class ProcessFleet:
    """A controller and its agents by name. All calls block: not for use on an event loop.

    `streams` is its image server's, where one was begun with it.
    """

    def __init__(
        self, directory: Path, *, address: str = "127.0.0.1", launcher: Launcher | None = None, **settings: Any
    ) -> None:
        """`address` is where agents and this process reach the controller, which listens on all when it is no loopback.

        `settings` go over `QUICK`.
        """
        self.directory = directory
        self.settings = ControllerSettings(
            state=directory / "controller",
            host=address if address == "127.0.0.1" else "0.0.0.0",
            port=free_port(),
            agent_port=free_port(),
            addresses=(address,),
            **{**QUICK, **settings},
        )
        self.streams = Streams()
        self.address = address
        self.launcher = launcher or (lambda _node: ())
        self.controller: Process | None = None
        self.agents: dict[str, Process] = {}
        self.nodes: list[str] = []
        self.starts = 0
        self._prepare()

    def _prepare(self) -> None:
        """What `python -m controller init` and `token` make, without two more processes."""
        prepare_state(self.settings)
        schema.upgrade(self.settings.url)
        settings_module.save(self.settings)
        self.token, record = new_token("admin", "admin", SystemClock())

        async def add() -> None:
            store = Database(self.settings.url, lambda _changes: None)
            await store.open()
            await store.write(lambda transaction: token_rows.rows.insert(transaction, record))
            await store.close()

        asyncio.run(add())
        authority = self.settings.state / "tls" / "ca.crt"
        self.client = httpx.Client(
            base_url=f"https://{self.address}:{self.settings.port}",
            verify=ssl.create_default_context(cafile=str(authority)),
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=60.0,
            trust_env=False,
        )

    # ------------------------------------------------------------ processes

    def start_controller(self, failpoint: str = "", *, wait: bool = True, **environment: str) -> Process:
        """Start the controller, armed with a fail point where one is named; `wait` until it serves."""
        assert self.controller is None or not self.controller.running, "it runs already"
        state = str(self.settings.state)
        command = [sys.executable, "-m", "controller", "run", "--state", state]
        environment |= {FAILPOINT: f"{failpoint}=kill" if failpoint else ""}
        self.controller = Process("controller", command, self.directory / "controller.log", environment)
        self.starts += 1
        if wait:
            self.wait_controller()
        return self.controller

    def wait_controller(self) -> None:
        """Wait until the controller answers."""

        def answers() -> bool:
            assert self.controller is not None
            assert self.controller.running, f"the controller ended: {self.controller.last_words()}"
            return self.request("GET", "/1.0").code == 200

        until(answers, "the controller serves", START_TIME)

    def start_agent(self, name: str, failpoint: str = "", **environment: str) -> Process:
        """Start the agent of a node that has joined; see `wait_online`."""
        assert name not in self.agents or not self.agents[name].running, "it runs already"
        command = [*self.launcher(name), sys.executable, "-m", "agent", "run", "--state", str(self.state(name))]
        environment |= {FAILPOINT: f"{failpoint}=kill" if failpoint else ""}
        self.agents[name] = Process(name, command, self.directory / f"{name}.log", environment)
        self.starts += 1
        return self.agents[name]

    def restart_controller(self, failpoint: str = "") -> Process:
        """`kill -9` if it still runs, and start it again."""
        if self.controller is not None:
            self.controller.kill()
        return self.start_controller(failpoint)

    def restart_agent(self, name: str, failpoint: str = "") -> Process:
        """`kill -9` if it still runs, and start it again."""
        if name in self.agents:
            self.agents[name].kill()
        return self.start_agent(name, failpoint)

    def processes(self) -> dict[str, Process]:
        """Those that run, by name."""
        every = {**self.agents, **({"controller": self.controller} if self.controller else {})}
        return {name: process for name, process in every.items() if process.running}

    def join(self, name: str, **options: Any) -> None:
        """Enrol a node by a one-time token, as `python -m agent join` does."""
        token = self.call("POST", "/1.0/nodes", {"name": name}).metadata["token"]
        options = {"data_port": free_port(), "address": "127.0.0.1"} | options
        config = AgentConfig(state=self.state(name), node=name, driver="fake", **options)
        asyncio.run(enrolment.join(token, config, SystemClock()))
        self.nodes.append(name)

    def wait_online(self, *names: str, seconds: float = 20.0) -> None:
        """Wait until the API shows these nodes (all when none is named) as in reach, by the agents that run now."""

        def online(name: str) -> bool:
            in_reach = self.node_status(name) in ("Online", "Draining")
            return in_reach and self.agents[name].has_said('"welcomed"')

        for name in names or tuple(self.nodes):
            until(partial(online, name), f"node {name} Online", seconds, every=0.02)

    def node_status(self, name: str) -> str:
        """How the controller sees a node; empty when it does not answer."""
        answer = self.request("GET", f"/1.0/nodes/{name}")
        return str(answer.metadata["status"]) if answer.code == 200 else ""

    def up(self, nodes: int = 1) -> ProcessFleet:
        """Start the controller, join node1 … nodeN, start their agents and wait until all are Online."""
        self.start_controller()
        for number in range(1, nodes + 1):
            self.join(f"node{number}")
            self.start_agent(f"node{number}")
        self.wait_online()
        return self

    def heal(self) -> None:
        """Start again what does not run, and wait until all nodes are Online."""
        if self.controller is None or not self.controller.running:
            self.start_controller()
        for name in self.nodes:
            if name not in self.agents or not self.agents[name].running:
                self.start_agent(name)
        self.wait_online()

    def close(self) -> None:
        """End all processes, by their pids, and remove the directory."""
        self.client.close()
        for process in self.processes().values():
            process.kill()
        shutil.rmtree(self.directory)

    # ------------------------------------------------------------ the API

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """A request; code 0 when there is no connection or it broke off. A `body` of bytes is sent as it is."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        if body is not None:
            headers["Content-Type"] = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        try:
            response = self.client.request(method, path, content=content, headers=headers)
            return Answer(response.status_code, response.json())
        except (httpx.TransportError, json.JSONDecodeError):
            return Answer(0)

    def call(self, method: str, path: str, body: Any = None) -> Answer:
        """A request that must succeed."""
        answer = self.request(method, path, body)
        assert 200 <= answer.code < 300, f"{method} {path}: {answer.code} {answer.envelope}"
        return answer

    def operation(self, identity: str, timeout: float = 30.0) -> dict[str, Any]:
        """An operation once it has ended, or as it is after `timeout` seconds, through restarts of the controller."""
        end = time.monotonic() + timeout
        while True:
            left = max(0, round(end - time.monotonic()))
            answer = self.request("GET", f"/1.0/operations/{identity}/wait?timeout={left}")
            if answer.code == 200 or time.monotonic() >= end:
                assert answer.code == 200, f"operation {identity}: {answer}"
                return dict(answer.metadata)
            time.sleep(0.02)

    def done(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """An operation that must end in Success."""
        accepted = self.call(method, path, body).operation
        assert accepted is not None, f"{method} {path} was no operation"
        ended = self.operation(accepted)
        assert ended["status"] == "Success", ended
        return ended

    # ------------------------------------------------------------ the nodes' side

    def state(self, node: str) -> Path:
        """The directory of a node's agent."""
        return self.directory / node

    def world(self, node: str) -> dict[str, Any]:
        """What a fake node has: `containers` by id with `status`, `spec`, `snapshots`; `images`."""
        file = self.state(node) / "fake" / "world.json"
        return dict(json.loads(file.read_bytes())) if file.exists() else {"containers": {}, "images": {}}

    def effects(self, *nodes: str) -> list[tuple[str, str, str, str]]:
        """Every real effect of these nodes (all when none is named): node, driver's command, container, command id."""
        found: list[tuple[str, str, str, str]] = []
        for node in nodes or tuple(self.nodes):
            file = self.state(node) / "fake" / "effects"
            for line in file.read_text().splitlines() if file.exists() else []:
                command, target, identity = line.split()
                found.append((node, command, target, identity))
        return found

    def script(self, node: str, **script: Any) -> None:
        """Have a fake node follow a script (see `agent.drivers.fake_state.Script`); without arguments the usual one."""
        file = self.state(node) / "fake" / "script.json"
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(script), encoding="utf-8")
        temporary.replace(file)


@contextmanager
def process_fleet(nodes: int = 1, **options: Any) -> Iterator[ProcessFleet]:
    """A running fleet with nodes node1 … nodeN, gone afterwards; its logs are printed when the block fails.

    With `nodes=0` the controller is not started either. `options` are those of `ProcessFleet`.
    """
    directory = Path("/var/tmp") / f"vzf-{secrets.token_hex(4)}"
    directory.mkdir(mode=0o711)
    fleet: ProcessFleet | None = None
    try:
        with streams_server(directory) as streams:
            servers = {"image_servers": {"images": streams.url}, "image_ca": directory / "image-ca.pem"}
            fleet = ProcessFleet(directory, **{**servers, **options})
            fleet.streams = streams
            if nodes:
                fleet.up(nodes)
            yield fleet
    except BaseException:
        for log in sorted(directory.glob("*.log")):
            print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")
        raise
    finally:
        if fleet is not None:
            fleet.close()
        else:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(directory)
