"""The agent as a process of its own, with the fake driver, against a double of the controller."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.config import AgentConfig, encode
from agent.executor import BOUNDARIES
from common import keys
from common.commands import CreateContainer, StartContainer
from common.messages import Accepted, Confirm, Result, ResultAcknowledged, Samples, StateChanged
from common.reports import ContainerSpec
from common.states import Status
from tests.helpers.fake_controller import FakeController
from tests.helpers.https_server import authority

ROOT = Path(__file__).parents[2]
CREATE = CreateContainer(ContainerSpec("101", 1, "web", "00:16:3e:00:00:01", {"boot.autostart": "true"}), None)


@dataclass
class Host:
    """A host that is enrolled: its agent can be started, killed and started again."""

    state: Path
    key: str

    @property
    def log(self) -> Path:
        return self.state / "agent.log"

    def script(self, **fields: object) -> None:
        (self.state / "fake").mkdir(exist_ok=True)
        (self.state / "fake" / "script.json").write_text(json.dumps(fields))

    def wait_for_log(self, text: str, times: int) -> None:
        deadline = time.monotonic() + 10
        while self.log.read_text().count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} never came"
            time.sleep(0.02)

    def effects(self) -> list[str]:
        file = self.state / "fake" / "effects"
        return file.read_text().splitlines() if file.exists() else []

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agent", *arguments, "--state", str(self.state)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)

    @asynccontextmanager
    async def agent(self, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """The agent, running; killed at the end if it still is."""
        command = [sys.executable, "-m", "agent", "run", "--state", str(self.state), "--pid-file"]
        command.append(str(self.state / "agent.pid"))
        # Into a file: a pipe that nobody reads would stop the agent when it is full.
        with self.log.open("ab") as log:
            environment = {**os.environ, **environment}
            process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stderr=log)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def enrol(state: Path, controller: FakeController) -> Host:
    """What `join` leaves behind."""
    state.mkdir(parents=True, exist_ok=True)
    pair = keys.load_or_create(state / "agent.key")
    config = AgentConfig(
        state=state,
        node="node1",
        controller=controller.address,
        api="https://127.0.0.1:1",
        driver="fake",
        autostart_delay=None,
    )
    (state / "agent.json").write_text(encode(config))
    (state / "controller.pub").write_text(controller.keys.public)
    (state / "ca.crt").write_text(authority().ca)
    controller.allowed.add(pair.public)
    return Host(state, pair.public)


async def stop(process: asyncio.subprocess.Process) -> float:
    """End it as a service manager does; the seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 10) == 0
    return loop.time() - began


async def test_it_runs_samples_and_stops_without_touching_containers(tmp_path: Path) -> None:
    async with FakeController() as controller:
        host = enrol(tmp_path / "s", controller)
        async with host.agent() as process:
            inventory = await controller.expect_ready()
            assert (inventory.facts.driver, inventory.containers) == ("fake", ())
            assert (host.state / "agent.pid").read_text().strip() == str(process.pid)
            assert (await controller.expect(Samples)).containers == ()
            await controller.command("op/1/do", CREATE)
            await controller.command("op/2/do", StartContainer("101"))
            result = await controller.expect(Result)
            while result.command != "op/2/do":
                result = await controller.expect(Result)
            assert result.outcome is not None
            assert result.outcome.container is not None
            assert result.outcome.container.status == Status.RUNNING
            assert await stop(process) < 2
            assert not (host.state / "agent.pid").exists()
        async with host.agent():
            inventory = await controller.expect_ready()
            assert [report.status for report in inventory.containers] == [Status.RUNNING]


async def test_it_stops_in_time_in_the_middle_of_a_command_and_without_a_controller(tmp_path: Path) -> None:
    async with FakeController() as controller:
        host = enrol(tmp_path / "s", controller)
        host.script(delays={"container.create": 60})
        async with host.agent() as process:
            await controller.expect_ready()
            await controller.command("op/1/do", CREATE)
            await controller.expect(Accepted)
            assert await stop(process) < 2
    async with host.agent() as process:
        await asyncio.to_thread(host.wait_for_log, "the agent runs", 2)
        assert await stop(process) < 2


async def result_of(controller: FakeController, command: str) -> Result:
    """The next result of this command; one whose acknowledgement the agent's end overtook is told again before it."""
    while (result := await controller.expect(Result)).command != command:
        pass
    return result


async def test_a_killed_agent_tells_results_again_and_does_nothing_twice(tmp_path: Path) -> None:
    async with FakeController() as controller:
        host = enrol(tmp_path / "s", controller)
        for name in BOUNDARIES:
            create = CreateContainer(ContainerSpec(name, 1, "web", "00:16:3e:00:00:01", {}), None)
            command = f"{name}/1/do"
            async with host.agent(VZFLEET_FAILPOINT=f"agent/1/do/{name}=kill") as process:
                await controller.expect_ready()
                await controller.command(command, create)
                assert await asyncio.wait_for(process.wait(), 10) == -signal.SIGKILL
            controller.connection = b""
            async with host.agent():
                await controller.expect_ready()
                await controller.command(command, create)
                result = await result_of(controller, command)
                assert result.error is None
                await controller.send(ResultAcknowledged((command,)))
                # Once more: answered from the journal, even so.
                await controller.command(command, create)
                assert (await result_of(controller, command)).error is None
            counted = [line for line in host.effects() if command in line]
            assert counted == [f"container.create {name} {command}"], name
            controller.connection = b""


async def test_containers_start_with_the_host_once_confirmed_and_deaths_are_told(tmp_path: Path) -> None:
    async with FakeController() as controller:
        host = enrol(tmp_path / "s", controller)
        async with host.agent() as process:
            await controller.expect_ready()
            await controller.command("op/1/do", CREATE)
            await controller.expect(Result)
            await stop(process)
        down = host.call("down")
        assert (down.returncode, down.stderr) == (0, "")
        host.script(lifetimes={"101": 0.3})
        async with host.agent():
            await controller.expect_ready()
            await controller.send(Confirm({"101": 1}))
            assert (await controller.expect(StateChanged)).container.status == Status.RUNNING
            assert (await controller.expect(StateChanged)).container.status == Status.STOPPED


async def test_one_agent_for_a_directory_and_purge_leaves_nothing(tmp_path: Path) -> None:
    async with FakeController() as controller:
        host = enrol(tmp_path / "s", controller)
        async with host.agent() as process:
            await controller.expect_ready()
            for command in ("run", "down", "purge"):
                refused = await asyncio.to_thread(host.call, command)
                assert refused.returncode == 1
                assert "stop it first" in refused.stderr
            await stop(process)
        for _ in range(2):
            assert (await asyncio.to_thread(host.call, "purge")).returncode == 0
        assert list(tmp_path.iterdir()) == []


async def test_a_host_that_is_not_enrolled_is_told_so(tmp_path: Path) -> None:
    ended = await asyncio.to_thread(Host(tmp_path, "").call, "run")
    assert ended.returncode == 1
    assert "agent.json" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = await asyncio.to_thread(Host(tmp_path, "").call, "join", "no token")
    assert ended.returncode == 1
    assert "the token is damaged" in ended.stderr


async def test_it_is_light(tmp_path: Path) -> None:
    async with FakeController() as controller:
        host = enrol(tmp_path / "s", controller)
        async with host.agent() as process:
            await controller.expect_ready()
            for number in range(100):
                described = ContainerSpec(f"c{number}", 1, f"c{number}", "00:16:3e:00:00:01", {})
                await controller.command(f"op/{number}/do", CreateContainer(described, None))
            for _ in range(100):
                assert (await controller.expect(Result)).error is None
            await controller.send(ResultAcknowledged(tuple(f"op/{number}/do" for number in range(100))))
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = re.search(r"VmRSS:\s+(\d+) kB", status)
            assert resident is not None
            assert int(resident[1]) < 40 * 1024
            loaded = Path(f"/proc/{process.pid}/maps").read_text()
            assert "sqlalchemy" not in loaded
            assert "tornado" not in loaded
