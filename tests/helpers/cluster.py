"""A real controller and real agents in one process: real sockets, CURVE, TLS and SQLite; the fake driver by default."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from agent import enrolment
from agent.app import Agent
from agent.config import AgentConfig
from agent.config import load as load_agent
from agent.drivers.base import Driver
from common.clock import SystemClock
from controller.app import App, prepare_state
from controller.services.identities import new_token
from controller.settings import ControllerSettings
from controller.store import schema
from controller.store import tokens as token_rows

BUSYBOX: dict[str, Any] = {"type": "image", "properties": {"os": "busybox"}}
QUICK: dict[str, Any] = {
    "image_servers": {},
    "heartbeat_interval": 0.2,
    "heartbeat_timeout": 8.0,
    "sample_interval": 0.2,
}
DEADLINE = 30.0


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> Any:
    """Wait for a condition (a function, or one that returns an awaitable); fail naming it when it does not come."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"did not happen within {seconds} s: {what}"
        await asyncio.sleep(0.02)


class Cluster:
    """A controller, its agents by name, and a client with an admin's token. `call` is the usual way to use it."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.settings = ControllerSettings(
            state=directory / "controller",
            host="127.0.0.1",
            port=free_port(),
            agent_port=free_port(),
            addresses=("127.0.0.1",),
            **{**QUICK, **settings},
        )
        self.agents: dict[str, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self.token = ""

    async def start_controller(self) -> None:
        """Start the controller; the first time with everything that `init` makes."""
        first = not (self.settings.state / "controller.db").exists() and not self.token
        prepare_state(self.settings)
        await asyncio.to_thread(schema.upgrade, self.settings.url)
        self.app = App(self.settings)
        await self.app.start()
        if first:
            self.token = await self.make_token("admin", "admin")
        context = ssl.create_default_context(cafile=str(self.settings.state / "tls" / "ca.crt"))
        self.client = httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{self.settings.port}",
            verify=context,
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=DEADLINE,
            trust_env=False,
        )

    async def stop_controller(self) -> None:
        """Stop the controller; its state stays."""
        await self.client.aclose()
        await self.app.stop()

    async def make_token(self, name: str, role: str) -> str:
        """A bearer token of this role."""
        text, record = new_token(name, role, SystemClock())
        await self.app.store.write(lambda transaction: token_rows.rows.insert(transaction, record))
        return text

    async def join(self, name: str, driver: str = "fake", **options: Any) -> AgentConfig:
        """Enrol a node by a one-time token, as `python -m agent join` does."""
        token = (await self.call("POST", "/1.0/nodes", {"name": name}))["metadata"]["token"]
        options = {"data_port": free_port(), "address": "127.0.0.1"} | options
        config = AgentConfig(state=self.directory / name, node=name, driver=driver, **options)
        return await enrolment.join(token, config, SystemClock())

    async def start_agent(self, name: str, driver: Driver | None = None, status: str = "Online") -> None:
        """Start the agent of a node that has joined, and wait until the node has this status."""
        agent = Agent(load_agent(self.directory / name / "agent.json"), driver=driver)
        stop = asyncio.Event()
        self.agents[name] = (asyncio.create_task(agent.run(stop)), stop)
        await self.wait_for_node(name, status)

    async def stop_agent(self, name: str) -> None:
        """Stop a node's agent; its containers stay."""
        task, stop = self.agents.pop(name)
        stop.set()
        await task

    async def add_node(self, name: str, driver: str = "fake", **options: Any) -> None:
        """Join and start."""
        await self.join(name, driver, **options)
        await self.start_agent(name)

    async def wait_for_node(self, name: str, status: str) -> None:
        """Wait until the API shows a node with this status."""

        async def shown() -> bool:
            answer: dict[str, Any] = await self.call("GET", f"/1.0/nodes/{name}")
            return bool(answer["metadata"]["status"] == status)

        await until(shown, f"node {name} {status}")

    # ------------------------------------------------------------ the API

    async def request(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """A request as it is, with a JSON body unless `content` is given."""
        if body is not None:
            options["content"] = json.dumps(body)
            options["headers"] = {"Content-Type": "application/json", **options.get("headers", {})}
        return await self.client.request(method, path, **options)

    async def call(self, method: str, path: str, body: Any = None, code: int | None = None, **options: Any) -> Any:
        """A request that must answer with `code` (any success when None); returns the envelope."""
        response = await self.request(method, path, body, **options)
        expected = response.status_code < 300 if code is None else response.status_code == code
        assert expected, f"{method} {path}: {response.status_code} {response.text}"
        return response.json()

    async def refused(self, method: str, path: str, body: Any, code: int, **options: Any) -> Any:
        """A request that must be refused with `code`; returns the error's envelope."""
        answer = await self.call(method, path, body, code, **options)
        assert answer["type"] == "error" and answer["error_code"] == code and answer["error"], answer
        return answer

    async def operation(self, method: str, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        """An asynchronous request, followed to its end; returns the operation."""
        answer = await self.call(method, path, body, 202, **options)
        ended = await self.call("GET", f"{answer['operation']}/wait?timeout={int(DEADLINE)}")
        operation: dict[str, Any] = ended["metadata"]
        assert operation["status_code"] >= 200, operation
        return operation

    async def done(self, method: str, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        """An asynchronous request that must end in Success; returns the operation."""
        operation = await self.operation(method, path, body, **options)
        assert operation["status"] == "Success", operation
        return operation

    async def show(self, container: str) -> dict[str, Any]:
        """GET of a container."""
        answer: dict[str, Any] = (await self.call("GET", f"/1.0/vz/{container}"))["metadata"]
        return answer

    async def close(self) -> None:
        """Stop everything."""
        for name in list(self.agents):
            await self.stop_agent(name)
        await self.stop_controller()


@asynccontextmanager
async def cluster(directory: Path, nodes: int = 1, **settings: Any) -> AsyncIterator[Cluster]:
    """A running cluster with nodes node1, node2, … of the fake driver."""
    made = Cluster(directory, **settings)
    await made.start_controller()
    try:
        for number in range(1, nodes + 1):
            await made.add_node(f"node{number}")
        yield made
    finally:
        await made.close()
