"""A router that does to messages what no connection should: each comes twice, out of order, and again much later.

It stands where the controller meets the wire, inside the encryption, so that both directions pass it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from controller.dispatch.listener import Receive
from controller.dispatch.router import Router

WINDOW = 16
HOLD = 0.03
"""Seconds after which a held message goes on although no other came."""


class Shuffle:
    """Lets messages go in any order within the window, each twice."""

    def __init__(self, choice: random.Random, deliver: Callable[[bytes], object], counts: Counter[str]) -> None:
        self._choice = choice
        self._deliver = deliver
        self._counts = counts
        self._held: list[tuple[int, bytes]] = []
        self._put = self._latest = 0

    def put(self, payload: bytes) -> None:
        """A message is under way."""
        self._put += 1
        self._counts["duplicated"] += 1
        for _ in range(2):
            self._held.append((self._put, payload))
            asyncio.get_running_loop().call_later(HOLD, self._let_one_go)
        while len(self._held) > WINDOW:
            self._let_one_go()

    def _let_one_go(self) -> None:
        if self._held:
            number, payload = self._held.pop(self._choice.randrange(len(self._held)))
            self._counts["reordered"] += number < self._latest
            self._latest = max(self._latest, number)
            self._deliver(payload)


@dataclass
class Recorded:
    """All that was said on a connection."""

    connection: bytes
    key: str
    heard: list[bytes] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)


class Unruly(Router):
    """The controller's router with a network from hell in front of it, until `calm`."""

    choice = random.Random(0)
    made: Unruly | None = None
    """The one that the controller under test has made."""

    def start(self, receive: Receive) -> None:
        """See Router."""
        self.counts: Counter[str] = Counter()
        self.calm = False
        self.connections: dict[bytes, Recorded] = {}
        self._hear = receive
        self._in: dict[bytes, Shuffle] = {}
        self._out: dict[bytes, Shuffle] = {}
        type(self).made = self
        super().start(self._heard)

    def send(self, connection: bytes, payload: bytes) -> bool:
        """See Router."""
        if self.calm:
            return super().send(connection, payload)
        if connection in self.connections:
            self.connections[connection].sent.append(payload)
        self._outgoing(connection).put(payload)
        return True

    def _heard(self, connection: bytes, key: str, payload: bytes) -> None:
        if self.calm:
            return self._hear(connection, key, payload)
        self.connections.setdefault(connection, Recorded(connection, key)).heard.append(payload)
        return self._incoming(connection, key).put(payload)

    def _incoming(self, connection: bytes, key: str) -> Shuffle:
        if connection not in self._in:
            self._in[connection] = Shuffle(
                self.choice, lambda payload: self._hear(connection, key, payload), self.counts
            )
        return self._in[connection]

    def _outgoing(self, connection: bytes) -> Shuffle:
        if connection not in self._out:
            send = super().send
            self._out[connection] = Shuffle(self.choice, lambda payload: send(connection, payload), self.counts)
        return self._out[connection]

    def latest(self, key: str) -> Recorded:
        """What was said on the newest connection of a key."""
        return [recorded for recorded in self.connections.values() if recorded.key == key][-1]

    def replay(self, old: Recorded, new: Recorded) -> None:
        """Say a whole session again: to both sides on another connection, and to the controller on its own."""
        self.counts["sessions replayed"] += 1
        for payload in list(old.heard):
            self._hear(old.connection, old.key, payload)
            self._incoming(new.connection, new.key).put(payload)
        for payload in list(old.sent):
            self._outgoing(new.connection).put(payload)
