"""Work that several want at once and that is done once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Note = dict[str, Any]
Hear = Callable[[Note], None]
"""Called with how far it is, as an operation's `metadata.progress` shows it."""


@dataclass(eq=False)
class _Running(Generic[T]):
    listeners: list[Hear] = field(default_factory=list)
    task: asyncio.Future[T] | None = None
    told: Note | None = None

    def tell(self, note: Note) -> None:
        self.told = note
        for listener in self.listeners:
            listener(note)


class SharedWork(Generic[T]):
    """Work by key. Who gives up waiting takes nothing away from the others; when the last one does, it is stopped."""

    def __init__(self) -> None:
        self._running: dict[str, _Running[T]] = {}

    async def do(self, key: str, begin: Callable[[Hear], Awaitable[T]], hear: Hear) -> T:
        """The result of what runs under this key, or of `begin`, which then is told where to report to."""
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = _Running()
            running.task = asyncio.ensure_future(begin(running.tell))
            running.task.add_done_callback(lambda _, ended=running: self._forget(key, ended))  # type: ignore[misc]
        assert running.task is not None  # noqa: S101 - set above
        running.listeners.append(hear)
        if running.told is not None:
            hear(running.told)
        try:
            return await asyncio.shield(running.task)
        finally:
            running.listeners.remove(hear)
            if not running.listeners and not running.task.done():
                self._forget(key, running)
                running.task.cancel()
                await asyncio.gather(running.task, return_exceptions=True)

    def _forget(self, key: str, running: _Running[T]) -> None:
        if self._running.get(key) is running:
            del self._running[key]
