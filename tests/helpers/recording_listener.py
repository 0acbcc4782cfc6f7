"""A listener that keeps what the dispatcher tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping

from common.messages import Hello, Inventory, Samples, StateChanged
from common.states import NodeStatus


class RecordingListener:
    """Keeps everything in `heard`, in order. With a `gate`, inventories are processed when the test opens it."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, object]] = []
        self.generations: dict[str, int] = {}
        self.gate: asyncio.Event | None = None
        self.failure: Exception | None = None
        self._changed = asyncio.Event()

    def hello(self, node: str, hello: Hello) -> None:
        self._note("hello", node, hello)

    def inventory(self, node: str, inventory: Inventory) -> Mapping[str, int] | Awaitable[Mapping[str, int]]:
        self._note("inventory", node, inventory)
        if self.failure is not None:
            raise self.failure
        return self.generations if self.gate is None else self._later(self.gate)

    async def _later(self, gate: asyncio.Event) -> Mapping[str, int]:
        await gate.wait()
        if self.failure is not None:
            raise self.failure
        return self.generations

    def samples(self, node: str, samples: Samples) -> None:
        self._note("samples", node, samples)

    def state_changed(self, node: str, change: StateChanged) -> None:
        self._note("state_changed", node, change)

    def node_status(self, node: str, status: NodeStatus, reason: str) -> None:
        self._note("status", node, status)

    def of(self, kind: str, node: str) -> list[object]:
        """What was heard of one kind from one node."""
        return [what for heard, by, what in self.heard if (heard, by) == (kind, node)]

    async def wait_status(self, node: str, status: NodeStatus, timeout: float = 10.0) -> None:
        """Until the last status of the node is this one. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while self.of("status", node)[-1:] != [status]:
                self._changed.clear()
                await self._changed.wait()

    def _note(self, kind: str, node: str, what: object) -> None:
        self.heard.append((kind, node, what))
        self._changed.set()
