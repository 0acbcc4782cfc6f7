"""What an operator does beside the agent: containers made and removed by hand, a bridge deleted."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import pytest

from agent.drivers.lxc import commands, strangers
from common.errors import DriverFailed, NotFound
from common.states import Status
from tests.lxc.conftest import Node, until
from tests.lxc.test_lxc_lifecycle import by_hand, interfaces

pytestmark = [pytest.mark.lxc, pytest.mark.timeout(120)]


async def test_containers_made_and_removed_by_hand_are_heard_of(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    state = commands.state

    async def counted(directory: Path, container: str) -> str:
        asked.append(container)
        return await state(directory, container)

    monkeypatch.setattr(commands, "state", counted)
    directory = node.config.state / "lxc"
    begun = time.monotonic()
    by_hand("lxc-create", "-P", str(directory), "-n", "byhand", "-t", "none")
    await until(lambda: node.heard, timeout=4)
    assert time.monotonic() - begun < 4
    await until(lambda: node.heard[-1][0].status == Status.STOPPED, timeout=4)
    assert {(report.id, report.generation, gone) for report, gone in node.heard} == {("byhand", 0, False)}
    told = len(node.heard)
    # What is known costs no process, and our own containers are no news.
    asked.clear()
    await node.driver.create(node.spec(), node.image)
    await node.driver.delete("101", force=False)
    await asyncio.sleep(2.5 * strangers.TICK)
    assert asked == [] and len(node.heard) == told
    with (directory / "byhand/config").open("a") as config:
        config.write("lxc.uts.name = other\n")
    await until(lambda: len(node.heard) == told + 1, timeout=4)
    by_hand("lxc-destroy", "-P", str(directory), "-n", "byhand")
    await until(lambda: node.heard[-1][1], timeout=4)
    assert (node.heard[-1][0].id, node.heard[-1][0].generation) == ("byhand", 0)


async def test_a_stranger_that_is_replaced_by_ours_is_told_as_gone(node: Node) -> None:
    (node.config.state / "lxc/101").mkdir()
    await until(lambda: node.heard, timeout=4)
    (node.config.state / "lxc/101").rmdir()
    await node.driver.create(node.spec(), node.image)
    await until(lambda: node.heard[-1][1], timeout=4)
    assert [(report.id, report.generation) for report, _ in node.heard] == [("101", 0), ("101", 0)]
    assert [report.generation for report in await node.driver.containers()] == [1]


async def test_what_is_left_behind_can_be_destroyed_by_hand_and_made_anew(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    by_hand("lxc-destroy", "-P", str(node.config.state / "lxc"), "-n", "101")
    await until(lambda: node.heard, timeout=4)
    assert (node.heard[0][0].id, node.heard[0][1]) == ("101", True)
    await node.driver.create(node.spec(generation=2), node.image)
    await node.driver.start("101")
    assert [report.generation for report in await node.driver.containers()] == [2]


async def test_a_container_whose_files_were_removed_by_hand_has_no_snapshot_taken(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    await node.driver.create_snapshot("101", "good")
    shutil.rmtree(node.rootfs())
    with pytest.raises(DriverFailed, match="the files of container 101 are missing"):
        await node.driver.create_snapshot("101", "empty")
    assert [snapshot.name for snapshot in (await node.driver.inspect("101")).snapshots] == ["good"]
    await node.driver.restore_snapshot("101", "good")
    await node.driver.start("101")


async def test_a_change_of_a_container_that_was_just_removed_by_hand_says_so(node: Node) -> None:
    await node.driver.create(node.spec(), node.image)
    shutil.rmtree(node.config.state / "lxc/101")
    with pytest.raises(NotFound, match="container 101 is not on this node"):
        await node.driver.update(node.spec(limits__memory="64MiB"))


async def test_a_bridge_removed_by_hand_is_back_at_the_next_start(node: Node) -> None:
    await node.running("101")
    by_hand("ip", "link", "delete", "dev", node.config.managed_bridge)
    await node.running("102")
    for container in ("101", "102"):
        cable = commands.veth_name(node.config.state, container)
        lines = [line for line in interfaces().splitlines() if f" {cable}@" in line]
        assert len(lines) == 1 and f" master {node.config.managed_bridge} " in lines[0]
        await until(lambda container=container: _addresses(node, container))


def _addresses(node: Node, container: str) -> list[str]:
    cards = node.driver.sample([container])[0].interfaces
    return [one.address for card in cards for one in card.addresses if one.scope == "global"]
