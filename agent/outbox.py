"""What waits to be sent in a session: replies, which are never dropped, and samples, of which the newest count."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from common.messages import AgentMessage, Inventory, Samples

KEPT_TICKS = 3
"""Ticks of samples that wait for a slow link; older ones are dropped."""


class Outbox:
    """Two queues, open while there is a session. While it is held, everything waits.

    It is held until the session's inventory is told, and whenever another is being taken: a reply that was older than
    the inventory, but came after it, would be believed.
    """

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self._replies: deque[AgentMessage] = deque()
        self._ticks: deque[Sequence[Samples]] = deque(maxlen=KEPT_TICKS)
        self._held = False
        self._waiting = asyncio.Event()

    def open(self) -> None:
        """A session has begun."""
        self._held = True
        self.opened.set()

    def close(self) -> None:
        """The session is over: what waits is dropped."""
        self.opened.clear()
        self._replies.clear()
        self._ticks.clear()
        self._held = False

    def put(self, message: AgentMessage) -> None:
        """Have a message delivered in order in this session; without a session it is dropped."""
        if self.opened.is_set():
            self._replies.append(message)
            self._waiting.set()

    def offer(self, samples: Sequence[Samples]) -> None:
        """Have a tick's figures delivered, unless newer ones push them out."""
        if self.opened.is_set():
            self._ticks.append(samples)
            self._waiting.set()

    def hold(self) -> None:
        """Keep everything back until `release`."""
        self._held = True

    def release(self, inventory: Inventory) -> None:
        """Let everything go, after this inventory."""
        self._replies.appendleft(inventory)
        self._held = False
        self._waiting.set()

    async def take(self) -> Sequence[AgentMessage]:
        """Wait for what is to be sent next: a reply, else a tick of samples."""
        while self._held or not (self._replies or self._ticks):
            self._waiting.clear()
            await self._waiting.wait()
        return (self._replies.popleft(),) if self._replies else self._ticks.popleft()
