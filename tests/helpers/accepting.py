"""One request for every kind of operation, on the containers of `tests.helpers.core.Core`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from controller.operations.images import DeleteImageParameters, ImportParameters
from controller.records import Operation
from controller.services.requests import (
    CopySource,
    CreateBody,
    ImageSource,
    RenameBody,
    SnapshotBody,
    StateBody,
    UpdateBody,
)
from tests.helpers.core import CALLER, FINGERPRINT, Core

Accept = Callable[[Core], Awaitable[Operation]]


def _on_images(kind: str, parameters: Any) -> Accept:
    def accept(core: Core) -> Awaitable[Operation]:
        draft = core.operations.draft(CALLER, kind, containers=(), node=None, parameters=parameters)
        return core.operations.accept(lambda _: draft)

    return accept


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
    "snapshot.create": lambda core: core.states.take_snapshot(CALLER, "c", SnapshotBody("s1")),
    "snapshot.delete": lambda core: core.states.delete_snapshot(CALLER, "c", "s0"),
    "snapshot.restore": lambda core: core.states.restore(CALLER, "c", "s0"),
    "container.copy": lambda core: core.containers.create(
        CALLER, "new", CreateBody(CopySource("d"), node="n2", start=True)
    ),
    "container.move": lambda core: core.moves.move(CALLER, "c", RenameBody(name="m", node="n2", migration=True)),
    "image.import": _on_images("image.import", ImportParameters("upload", "x.tar", ("alias",))),
    "image.delete": _on_images("image.delete", DeleteImageParameters(FINGERPRINT)),
}
