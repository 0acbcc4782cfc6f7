"""The messages of a session in the order in which its agent sent them, and each once. Without I/O.

The transport keeps the order and repeats nothing; still, nothing that is decided here relies on it. A report that
came after a newer one would be believed until the next inventory.
"""

from __future__ import annotations

from common.messages import FromAgent

PATIENCE = 2.0
"""Seconds for which a missing message is waited for. None is ever lost in a session, but one may be unreadable."""
MOST = 100
"""Messages that are held for a missing one; each may take a megabyte, and agents choose their numbers."""


class Arrivals:
    """Numbered messages, from 1. Those without a number (of an earlier version's agent) are taken as they come."""

    def __init__(self) -> None:
        self._next = 1
        self._held: dict[int, FromAgent] = {}
        self._since = 0.0
        """Since when the message `_next` has been missing, while any later one is held."""

    def take(self, message: FromAgent, now: float) -> list[FromAgent]:
        """A message came: what is to be handled now, in this order."""
        if message.number == 0:
            return [message]
        if message.number < self._next or message.number in self._held:
            return []
        if not self._held:
            self._since = now
        self._held[message.number] = message
        return self._in_order(now) if len(self._held) <= MOST else self._pass_over(now)

    def overdue(self, now: float) -> list[FromAgent]:
        """What is to be handled now because the message before it has not come in time."""
        return self._pass_over(now) if self._held and now - self._since >= PATIENCE else []

    def _pass_over(self, now: float) -> list[FromAgent]:
        self._next = min(self._held)
        return self._in_order(now)

    def _in_order(self, now: float) -> list[FromAgent]:
        ready: list[FromAgent] = []
        while self._next in self._held:
            ready.append(self._held.pop(self._next))
            self._next += 1
        if ready:
            self._since = now
        return ready
