"""Containers are stopped with their host, and at no other end of their agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import host_shutdown
from agent.drivers.fake_state import Fault
from common.commands import CreateContainer
from common.process import Completed
from common.states import Status
from tests.helpers.agent_parts import Parts, agent_parts, spec


async def prepare(parts: Parts) -> None:
    """A node with one container that runs, one that is frozen and one that is stopped."""
    for id in ("running", "frozen", "stopped"):
        await parts.do(f"op/{id}/do", CreateContainer(spec(id), None))
    await parts.driver.start("running")
    await parts.driver.start("frozen")
    await parts.driver.freeze("frozen")


async def states(parts: Parts) -> dict[str, Status]:
    return {container.id: container.status for container in await parts.driver.containers()}


@pytest.mark.parametrize(
    ("systemd", "says", "stopped"),
    [(True, "stopping", True), (True, "running", False), (True, "degraded", False), (False, "stopping", False)],
)
async def test_only_a_host_that_goes_down_stops_its_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systemd: bool, says: str, stopped: bool
) -> None:
    async def run(_arguments: list[str], **_options: object) -> Completed:
        return Completed(int(says != "running"), f"{says}\n", "")

    monkeypatch.setattr(host_shutdown, "SYSTEMD", tmp_path if systemd else tmp_path / "none")
    monkeypatch.setattr(host_shutdown, "run", run)
    async with agent_parts(tmp_path) as parts:
        await prepare(parts)
        before = await states(parts)
        await host_shutdown.stop_containers(parts.driver)
        after = await states(parts)
        assert before == {"running": Status.RUNNING, "frozen": Status.FROZEN, "stopped": Status.STOPPED}
        assert after == (dict.fromkeys(before, Status.STOPPED) if stopped else before)


async def test_a_container_that_does_not_stop_in_time_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(_arguments: list[str], **_options: object) -> Completed:
        return Completed(1, "stopping\n", "")

    monkeypatch.setattr(host_shutdown, "SYSTEMD", tmp_path)
    monkeypatch.setattr(host_shutdown, "STOP_WITHIN", 0.05)
    monkeypatch.setattr(host_shutdown, "run", run)
    async with agent_parts(tmp_path) as parts:
        await prepare(parts)
        parts.driver.script.stubborn.append("running")
        parts.driver.script.faults.append(Fault("container.stop", container="frozen"))
        await host_shutdown.stop_containers(parts.driver)
        assert await states(parts) == {
            "running": Status.STOPPED,
            "frozen": Status.FROZEN,
            "stopped": Status.STOPPED,
        }, "one that cannot be stopped keeps no other from it"
