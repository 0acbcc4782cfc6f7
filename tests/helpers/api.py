"""What tests of the API share: names of their own, scripts for fake nodes, what a request left behind."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.cluster import Cluster

EMPTY = {"type": "none"}
ENVELOPE = {"type", "status", "status_code", "operation", "error_code", "error", "metadata"}
OPERATION_URL = re.compile(r"/1\.0/operations/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")


def name(prefix: str = "ct") -> str:
    """A name that no other test has."""
    return f"{prefix}-{secrets.token_hex(4)}"


async def make(fleet: Cluster, start: bool = False, **fields: Any) -> str:
    """A new container, empty unless `source` is given; returns its id."""
    container = name()
    await fleet.done("POST", f"/1.0/vz/{container}", {"source": EMPTY, "start": start, **fields})
    return container


def node_directory(fleet: Cluster, node: str) -> Path:
    """Where a fake node keeps its world, its script and its effects."""
    return fleet.directory / node / "fake"


def effects(fleet: Cluster, container: str, node: str | None = None) -> list[str]:
    """The commands that had an effect on a container, in order; of one node, or of all."""
    nodes = [node] if node else sorted(fleet.agents)
    lines = [line.split() for each in nodes for line in _effect_lines(fleet, each)]
    return [command for command, target, _ in lines if target == container]


def _effect_lines(fleet: Cluster, node: str) -> list[str]:
    file = node_directory(fleet, node) / "effects"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


@contextmanager
def scripted(fleet: Cluster, node: str, **script: Any) -> Iterator[None]:
    """Have a fake node follow a script (see `agent.drivers.fake_state.Script`) within the block."""
    file = node_directory(fleet, node) / "script.json"
    _write(file, script)
    try:
        yield
    finally:
        _write(file, {})


def _write(file: Path, script: dict[str, Any]) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(script), encoding="utf-8")
    temporary.replace(file)


@dataclass(frozen=True)
class Trace:
    """All that a request could have changed: containers, operations, images, nodes, effects on nodes."""

    containers: list[Any]
    operations: Any
    images: list[Any]
    nodes: list[str]
    effects: tuple[tuple[str, ...], ...]

    @classmethod
    async def of(cls, fleet: Cluster) -> Trace:
        """As it is now. Live figures do not count."""
        containers = (await fleet.call("GET", "/1.0/vz?recursion=1"))["metadata"]
        for container in containers:
            container["status"] = container["status"]["status"]
        return cls(
            containers,
            (await fleet.call("GET", "/1.0/operations"))["metadata"],
            (await fleet.call("GET", "/1.0/images"))["metadata"],
            (await fleet.call("GET", "/1.0/nodes"))["metadata"],
            tuple(tuple(_effect_lines(fleet, node)) for node in sorted(fleet.agents)),
        )


@asynccontextmanager
async def nothing_happens(fleet: Cluster) -> AsyncIterator[None]:
    """Fail when the block leaves anything behind."""
    before = await Trace.of(fleet)
    yield
    assert await Trace.of(fleet) == before
