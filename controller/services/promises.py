"""Idempotency-Key: the same write under the same key gives the first answer again and happens once.

The answer of an operation is kept in the transaction that accepts it, so that there is never one without the other.
Any other write's answer is kept right after its effect. Refusals are not kept: nothing has happened, the same key may
be used again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from common.clock import Clock, timestamp
from common.errors import Conflict, InvalidRequest
from controller.records import FirstAnswer, Operation
from controller.store import promises as rows
from controller.store.db import Database, Transaction

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass
class Promise:
    """A write under way with its key.

    `digest` is a sha256 of all that was asked, `render` gives an accepted operation's answer: code, Location, body.
    """

    caller: str
    key: str
    digest: str
    request: str
    render: Callable[[Operation], tuple[int, str, bytes]]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


def check_key(key: str) -> str:
    """The key itself. Raises InvalidRequest unless it is 1 to 255 printable ASCII characters without blanks."""
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            "invalid Idempotency-Key", field="Idempotency-Key", allowed="1-255 printable ASCII characters, no blanks"
        )
    return key


class Promises:
    """First answers, and the writes under way that will have one."""

    def __init__(self, store: Database, clock: Clock, lifetime: float) -> None:
        """`lifetime` in seconds is how long a key is remembered."""
        self._store = store
        self._clock = clock
        self._lifetime = lifetime
        self._open: dict[tuple[str, str], Promise] = {}
        self._by_request: dict[str, Promise] = {}

    async def begin(self, promise: Promise) -> FirstAnswer | None:
        """The answer that was given already, or None: then do it, and `end` whatever comes of it.

        Waits while the same key is under way. Raises Conflict when the key was used for something else.
        """
        place = (promise.caller, promise.key)
        while (twin := self._open.get(place)) is not None:
            await twin.ended.wait()
        self._open[place] = self._by_request[promise.request] = promise
        try:
            kept = await self._store.read(lambda connection: rows.find(connection, *place))
        except BaseException:
            self.end(promise)
            raise
        if kept is None or kept.created_at < self._oldest():
            return None
        self.end(promise)
        if kept.digest != promise.digest:
            raise Conflict(
                "this Idempotency-Key was used for another request", field="Idempotency-Key", allowed="a new key"
            )
        return kept

    def end(self, promise: Promise) -> None:
        """It is answered: another with the same key may go on. A second time does nothing."""
        place = (promise.caller, promise.key)
        if self._open.get(place) is promise:
            del self._open[place]
            self._by_request.pop(promise.request, None)
            promise.ended.set()

    def accepted(self, transaction: Transaction, operation: Operation) -> None:
        """Keep the answer of an operation, if its request came with a key, in the transaction that accepts it."""
        # Taken out: what one request leads to later is not its answer.
        promise = self._by_request.pop(operation.request, None)
        if promise is not None:
            self._write(transaction, promise, *promise.render(operation))

    async def answered(self, promise: Promise, status: int, location: str | None, body: bytes) -> None:
        """Keep any other write's answer."""
        await self._store.write(lambda transaction: self._write(transaction, promise, status, location, body))

    def _write(
        self, transaction: Transaction, promise: Promise, status: int, location: str | None, body: bytes
    ) -> None:
        rows.forget(transaction, promise.caller, promise.key)
        now = timestamp(self._clock.now())
        rows.keep(
            transaction,
            FirstAnswer(promise.caller, promise.key, promise.digest, now, status, location, body.decode()),
        )

    async def prune(self) -> int:
        """Forget a small batch of keys that are too old; returns how many."""
        return await self._store.write(lambda transaction: rows.prune(transaction, self._oldest()))

    def _oldest(self) -> str:
        return timestamp(self._clock.now() - timedelta(seconds=self._lifetime))
