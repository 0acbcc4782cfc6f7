"""The services' rules that hold between a request and its transaction, and between an agent's word and a row."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.clock import ManualClock
from common.errors import Conflict, InvalidRequest, NoPlacement
from common.keys import check_public_key, generate
from common.messages import Inventory, Samples
from common.reports import ContainerReport, ContainerSample, NodeSample
from common.states import Status
from controller.records import Container, Phase
from controller.services import containers as containers_module
from controller.services.identities import new_token
from controller.services.requests import CreateBody, NoSource, PlacementBody, RenameBody, SnapshotBody, UpdateBody
from controller.store import containers as container_rows
from controller.store import nodes as node_rows
from tests.helpers.core import CALLER, FACTS, Core, make_template, open_core

GB = 10**9


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[Core]:
    template = await asyncio.to_thread(make_template, tmp_path)
    core = await open_core(template, tmp_path / "core")
    yield core
    await core.close()


def empty(**config: str) -> CreateBody:
    return CreateBody(NoSource(), config={key.replace("_", "."): value for key, value in config.items()}, node="n1")


async def change(core: Core, **fields: Any) -> None:
    """Change container d's row behind everybody's back."""

    def write(transaction: Any) -> Container:
        record = container_rows.require(transaction, "d")
        return container_rows.rows.replace(transaction, replace(record, **fields))

    await core.store.write(write)


async def test_what_has_no_limit_counts_by_its_use(core: Core) -> None:
    await change(core, config={}, reserved_memory=0)
    used = ContainerSample("d", memory_usage=7 * GB, memory_reclaimable=2 * GB, disk_usage=90 * GB)
    load = NodeSample(3 * GB, 10 * GB, 0.5, (0.0, 0.0, 0.0), 9.0)
    core.fleet.state_changed("n1", replace(core.fleet.containers["d"].report, status=Status.RUNNING), removed=False)
    core.fleet.samples("n1", Samples(core.clock.now().timestamp(), load, (used,)))
    for key, most, over in (("limits.memory", "2800MB", "2801MB"), ("limits.disk", "10GB", "11GB")):
        fits = await core.containers.place(PlacementBody(config={key: most}, node="n1"))
        assert fits.node == "n1"
        refused = await core.containers.place(PlacementBody(config={key: over}, node="n1"))
        assert refused.node is None and "left to reserve" in refused.reasons["n1"]
    # Its own use does not stand in the way of its own limit.
    accepted = await core.changes.update(CALLER, "d", UpdateBody({"limits.memory": "7800MB"}), None)
    assert (await core.engine.wait(accepted.id, 20)).status is Status.SUCCESS
    with pytest.raises(NoPlacement):
        await core.changes.update(CALLER, "c", UpdateBody({"limits.memory": "1GB"}), None)


async def test_two_creations_at_once_do_not_share_what_is_left(core: Core) -> None:
    bodies = [core.containers.create(CALLER, f"x{number}", empty(limits_memory="5GB")) for number in range(2)]
    results = await asyncio.gather(*bodies, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["NoPlacement", "Operation"]


async def test_a_hardware_address_is_drawn_again_when_it_is_taken(core: Core, monkeypatch: Any) -> None:
    taken = (await core.rows())["c"].hwaddr
    drawn = iter([taken, taken, "00:16:3e:ff:ff:ff"])
    monkeypatch.setattr(containers_module, "hardware_address", lambda: next(drawn))
    await core.containers.create(CALLER, "x", empty())
    assert (await core.rows())["x"].hwaddr == "00:16:3e:ff:ff:ff"


async def test_a_put_without_a_description_keeps_the_one_that_was_written_meanwhile(core: Core) -> None:
    stale = core.fleet.containers["d"].record
    await change(core, description="new")
    core.fleet.containers["d"].record = stale
    accepted = await core.changes.update(CALLER, "d", UpdateBody({}), None)
    await core.engine.wait(accepted.id, 20)
    assert (await core.rows())["d"].description == "new"


async def test_the_transaction_decides_not_the_mirror(core: Core) -> None:
    live = core.fleet.containers["d"]
    stale = live.record
    await change(core, phase=Phase.FAILED, error="why")
    live.record = stale
    with pytest.raises(Conflict, match="not whole"):
        await core.snapshots.take(CALLER, "d", SnapshotBody("s"))
    await change(core, phase=Phase.READY, node="n2")
    live.record = stale
    with pytest.raises(Conflict, match="already"):
        await core.moves.move(CALLER, "d", RenameBody(node="n2", migration=True))
    del core.fleet.containers["c"].snapshots["s0"]
    with pytest.raises(Conflict, match="s0 already"):
        await core.snapshots.take(CALLER, "c", SnapshotBody("s0"))


async def test_an_id_of_nobodys_container_is_not_given_away(core: Core) -> None:
    core.fleet.state_changed("n1", ContainerReport("mine", 0, Status.STOPPED), removed=False)
    with pytest.raises(Conflict, match="unmanaged"):
        await core.changes.rename(CALLER, "d", RenameBody(name="mine"))
    with pytest.raises(NoPlacement, match="unmanaged"):
        await core.containers.create(CALLER, "mine", empty())


async def test_an_inventory_counts_before_what_the_node_says_next(core: Core) -> None:
    report = core.there.report("n1", "c")
    taking = asyncio.ensure_future(core.nodes.inventory("n1", Inventory(replace(FACTS, cpus=8), (report,), ())))
    await asyncio.sleep(0)
    core.fleet.state_changed("n1", replace(report, status=Status.STOPPED), removed=False)
    generations = await taking
    assert core.fleet.status_of(core.fleet.containers["c"]).status is Status.STOPPED
    assert generations == {"c": 1, "d": 2, "z": 3}
    facts = core.fleet.nodes["n1"].record.facts
    assert facts is not None and facts.cpus == 8


async def test_a_node_that_is_removed_while_it_reports_does_not_come_back(core: Core) -> None:
    removing = core.store.write(lambda transaction: node_rows.rows.delete(transaction, "n2"))
    taking = core.nodes.inventory("n2", Inventory(replace(FACTS, cpus=8), (), ()))
    await asyncio.gather(removing, taking)
    assert "n2" not in core.fleet.nodes


async def test_kept_figures_of_another_version_do_not_keep_the_controller_from_starting(core: Core) -> None:
    await core.nodes.save_figures()
    broken = {"last_seen": "then", "containers": [{"report": {"strange": 1}, "sample": None, "sampled_at": 1}]}
    await core.store.write(lambda transaction: node_rows.save_samples(transaction, "n1", "then", broken))
    await core.store.write(lambda transaction: node_rows.save_samples(transaction, "n2", "then", {"older": 1}))
    for name in ("n1", "n2"):
        core.fleet.node_status(name, type(core.fleet.nodes[name].status).OFFLINE, "")
    await core.nodes.restore_figures()


def test_a_key_that_is_none_is_refused() -> None:
    key = generate().public
    assert check_public_key(key) == key
    for text in ("", "short", "#" * 40, "ü" * 40, " " * 40, key + "00000"):
        with pytest.raises(InvalidRequest):
            check_public_key(text)


@pytest.mark.parametrize("bad", ["", " ", "a\nb", "é", "x" * 65])
def test_a_token_is_named_so_that_it_can_be_shown(bad: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        new_token(bad, "admin", ManualClock())
    assert refused.value.field == "name"
