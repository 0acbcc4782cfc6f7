"""The agent's end of the link: a session with the controller, begun anew whenever it breaks.

What a broken session did not deliver is told anew by the next one: results from the journal, states by the inventory.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import zmq.asyncio

from agent.connection import Connection, LinkLost, LinkRefused
from agent.identity import Identity
from agent.outbox import Outbox
from agent.session import LinkHandler, Session, first_failure
from common.clock import Clock
from common.keys import KeyPair
from common.messages import OLDEST_PROTOCOL, PROTOCOL, AgentMessage, Hello, Samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backoff:
    """Seconds before the next try: they double from `first` to `longest`, each time with jitter.

    To `unreachable` only where the controller is out of reach: once the network is back, so is the node within 10 s.
    """

    first: float = 0.1
    longest: float = 10.0
    unreachable: float = 2.0

    def delay(self, failures: int, *, refused: bool = False) -> float:
        """Before the try after this many failures in a row, at least one. A refusal is not cured by haste."""
        longest = self.longest if refused else min(self.unreachable, self.longest)
        ceiling = min(longest, self.first * 2.0 ** min(failures + 5 * refused, 30))
        return random.uniform(0.5, 1.0) * ceiling  # noqa: S311 jitter


class Link:
    """Keeps a session with the controller. `connected` is set while there is one whose inventory is on its way."""

    def __init__(
        self,
        address: str,
        keys: KeyPair,
        controller_key: str,
        identity: Identity,
        clock: Clock,
        handler: LinkHandler,
        backoff: Backoff | None = None,
        seen: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """`seen` tells the highest epoch and generation in the journal."""
        self._address = address
        self._keys = keys
        self._controller_key = controller_key
        self._identity = identity
        self._clock = clock
        self._handler = handler
        self._backoff = backoff or Backoff()
        self._seen = seen
        self._commit = 0
        self._connections = 0
        self._outbox = Outbox()
        self.connected = self._outbox.opened

    def send(self, message: AgentMessage) -> None:
        """Have a message delivered in order in this session; without a session it is dropped."""
        self._outbox.put(message)

    def offer(self, samples: Sequence[Samples]) -> None:
        """Have a tick's figures delivered, unless newer ones push them out."""
        self._outbox.offer(samples)

    async def run(self) -> NoReturn:
        """Keep a session until cancelled."""
        context = zmq.asyncio.Context()
        failures = 0
        try:
            while True:
                began = self._clock.monotonic()
                try:
                    await self._session(context)
                except LinkLost as reason:
                    was_connected = self.connected.is_set()
                    failures = 1 if was_connected else failures + 1
                    delay = self._backoff.delay(failures, refused=isinstance(reason, LinkRefused))
                    lasted = round(self._clock.monotonic() - began, 1)
                    log.warning("no link", extra={"reason": str(reason), "lasted": lasted, "retry_in": round(delay, 2)})
                finally:
                    self._reset()
                await asyncio.sleep(delay)
        finally:
            context.destroy(linger=0)

    def _reset(self) -> None:
        was_connected = self.connected.is_set()
        self._outbox.close()
        if was_connected:
            self._handler.lost()

    async def _session(self, context: zmq.asyncio.Context) -> NoReturn:
        """One connection from HELLO to its end, which raises LinkLost."""
        connection = Connection(context, self._address, self._keys, self._controller_key)
        try:
            await first_failure(connection.watch(), self._converse(connection))
        finally:
            connection.close()

    async def _converse(self, connection: Connection) -> NoReturn:
        session = Session(connection, self._outbox, self._handler, self._clock)
        welcome = await session.open(self._hello())
        log.info("welcomed", extra={"node": welcome.node, "epoch": welcome.epoch, "session": welcome.session})
        self._outbox.open()
        try:
            await session.run(welcome)
        finally:
            self._commit = max(self._commit, session.commit)

    def _hello(self) -> Hello:
        self._connections += 1
        epoch, generation = self._seen()
        return Hello(
            oldest=OLDEST_PROTOCOL,
            newest=PROTOCOL,
            version=self._identity.version,
            boot_id=self._identity.boot_id,
            machine_id=self._identity.machine_id,
            instance=self._identity.instance,
            connection=self._connections,
            monotonic=self._clock.monotonic(),
            epoch=epoch,
            generation=generation,
            commit=self._commit,
        )
