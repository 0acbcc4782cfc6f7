"""One request for every kind of operation, on the containers of `tests.helpers.core.Core`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from common.reports import ContainerSpec
from common.states import Status
from controller.images.servers import Keep
from controller.operations.image_pulls import PullParameters, RefreshParameters
from controller.operations.images import DeleteImageParameters, ImportParameters
from controller.records import Operation
from controller.services.image_bodies import ImageBody, ImageOriginBody
from controller.services.requests import (
    AdoptSource,
    CopySource,
    CreateBody,
    ImageSource,
    NodeStateBody,
    RecoverBody,
    RenameBody,
    SnapshotBody,
    SnapshotRenameBody,
    SnapshotUpdateBody,
    StateBody,
    UpdateBody,
)
from tests.helpers.core import CALLER, FINGERPRINT, Core, There

Accept = Callable[[Core], Awaitable[Operation]]


def _on_images(kind: str, parameters: Any) -> Accept:
    def accept(core: Core) -> Awaitable[Operation]:
        draft = core.operations.draft(CALLER, kind, containers=(), node=None, parameters=parameters)
        return core.operations.accept(lambda _: draft)

    return accept


async def _drain(core: Core) -> Operation:
    accepted = await core.drains.drain(CALLER, "n1", NodeStateBody("drain"))
    assert isinstance(accepted, Operation)
    return accepted


async def _restore(core: Core) -> Operation:
    await core.engine.wait((await _drain(core)).id, None)
    accepted = await core.drains.restore(CALLER, "n1", NodeStateBody("restore"))
    assert isinstance(accepted, Operation)
    return accepted


async def _recover(core: Core) -> Operation:
    await core.fence("n1")
    body = RecoverBody(True, ImageSource(properties={"os": "test"}), start=True)
    return await core.recovery.recover(CALLER, "c", body)


async def _recover_by_copy(core: Core) -> Operation:
    moved = await core.moves.move(CALLER, "d", RenameBody(node="n2", migration=True))
    await core.engine.wait(moved.id, None)
    await core.fence("n1")
    return await core.recovery.recover(CALLER, "c", RecoverBody(True, CopySource("d"), start=True))


async def _refresh(core: Core) -> Operation:
    """A copy on the other node, which gets the files of c."""
    if ("n2", "d") not in core.there.there:
        moved = await core.moves.move(CALLER, "d", RenameBody(node="n2", migration=True))
        await core.engine.wait(moved.id, None)
    source = CopySource("c", refresh=True)
    return await core.refreshes.refresh(CALLER, "d", CreateBody(source), source)


async def _adopt(core: Core) -> Operation:
    """One that is there of a generation of before, with a snapshot, and runs."""
    if ("n2", "left") not in core.there.there:
        spec = ContainerSpec("left", 1, "left-over", "00:16:3e:00:09:01", {"limits.memory": "50MB"})
        core.there.there["n2", "left"] = There(spec, Status.RUNNING, {"s1"})
        core.strays.add(("n2", "left", spec.generation))
        core.fleet.state_changed("n2", core.there.report("n2", "left"), removed=False)
    return await core.adoptions.adopt(CALLER, "left", CreateBody(AdoptSource(), hostname="kept", node="n2"))


EXPIRY = datetime(2027, 1, 1, tzinfo=UTC)
ACCEPT: dict[str, Accept] = {
    "container.create": lambda core: core.containers.create(
        CALLER,
        "new",
        CreateBody(ImageSource(properties={"os": "test"}), config={"limits.memory": "200MB"}, node="n1", start=True),
    ),
    "container.update": lambda core: core.changes.update(CALLER, "c", UpdateBody({"limits.memory": "300MB"}), None),
    "container.rename": lambda core: core.changes.rename(CALLER, "d", RenameBody(name="e", hostname="other")),
    "container.delete": lambda core: core.changes.delete(CALLER, "c", force=True),
    "container.start": lambda core: core.states.change(CALLER, "d", StateBody("start")),
    "container.stop": lambda core: core.states.change(CALLER, "c", StateBody("stop")),
    "container.restart": lambda core: core.states.change(CALLER, "c", StateBody("restart")),
    "container.freeze": lambda core: core.states.change(CALLER, "c", StateBody("freeze")),
    "container.unfreeze": lambda core: core.states.change(CALLER, "z", StateBody("unfreeze")),
    "snapshot.create": lambda core: core.snapshots.take(CALLER, "c", SnapshotBody("s1")),
    "snapshot.delete": lambda core: core.snapshots.delete(CALLER, "c", "s0"),
    "snapshot.rename": lambda core: core.snapshots.rename(CALLER, "c", "s0", SnapshotRenameBody("s2")),
    "snapshot.update": lambda core: core.snapshots.update(CALLER, "c", "s0", SnapshotUpdateBody(EXPIRY), None),
    "snapshot.restore": lambda core: core.snapshots.restore(CALLER, "c", "s0"),
    "container.copy": lambda core: core.containers.create(
        CALLER, "new", CreateBody(CopySource("d"), node="n2", start=True)
    ),
    "container.move": lambda core: core.moves.move(CALLER, "c", RenameBody(name="m", node="n2", migration=True)),
    "container.refresh": _refresh,
    "container.adopt": _adopt,
    "container.recover": _recover,
    "container.recover-by-copy": _recover_by_copy,
    "node.drain": _drain,
    "node.restore": _restore,
    "image.pull": _on_images("image.pull", PullParameters(Keep(("alias",)), url="https://localhost/x.tar")),
    "image.refresh": _on_images("image.refresh", RefreshParameters(FINGERPRINT)),
    "image.publish": lambda core: core.publications.publish(
        CALLER, ImageBody(ImageOriginBody("snapshot", name="c/s0"), alias="published")
    ),
    "image.import": _on_images("image.import", ImportParameters("upload", "x.tar", ("alias",))),
    "image.delete": _on_images("image.delete", DeleteImageParameters(FINGERPRINT)),
}
