"""Who may call: bearer tokens, of which only the hash is kept."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import uuid
from functools import partial

from common.clock import Clock, timestamp
from common.errors import InvalidRequest
from controller.records import Change, Token
from controller.spool import Spool
from controller.store import tokens as rows
from controller.store.db import Database, Transaction

PREFIX = "vzf_"
_NAME = re.compile(r"[\x20-\x7e]{0,63}[\x21-\x7e]")


def hash_token(text: str) -> str:
    """What the store keeps of a token."""
    return hashlib.sha256(text.encode()).hexdigest()


def new_token(name: str, role: str, clock: Clock) -> tuple[str, Token]:
    """A new token: its text, shown once, and its row. Raises InvalidRequest for a name that cannot be shown."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"invalid name {name[:64]!r}", field="name", allowed="1-64 printable ASCII characters")
    text = PREFIX + secrets.token_urlsafe(32)
    return text, Token(str(uuid.uuid4()), name, role, hash_token(text), timestamp(clock.now()))


class Identities:
    """The tokens in memory: every request asks, and asking must cost nothing."""

    def __init__(self, store: Database, spool: Spool, clock: Clock) -> None:
        self._store = store
        self._spool = spool
        self._clock = clock
        self._by_hash: dict[str, Token] = {}
        self._hash_by_id: dict[str, str] = {}
        self._taking_in = asyncio.Lock()

    async def open(self) -> None:
        """Load all tokens."""
        for token in await self._store.read(rows.rows.all):
            self._put(token)
        await self.take_in()

    async def take_in(self) -> None:
        """Take in the tokens that the command line has made meanwhile. Raises NoSpace; they wait on then."""
        async with self._taking_in:
            for file, token in self._spool.waiting().items():
                await self._store.write(partial(_add, token=token))
                file.unlink(missing_ok=True)

    def apply(self, change: Change) -> None:
        """Mirror a committed change."""
        if isinstance(change.record, Token):
            self._put(change.record)
        else:
            self._by_hash.pop(self._hash_by_id.pop(change.key, ""), None)

    def _put(self, token: Token) -> None:
        self._by_hash[token.hash] = token
        self._hash_by_id[token.id] = token.hash

    async def find(self, text: str) -> Token | None:
        """The token with this text, unless it has expired. Looked up by hash, so that time tells nothing of it."""
        key = hash_token(text)
        if key not in self._by_hash:
            await self.take_in()
        token = self._by_hash.get(key)
        if token is None or (token.expires_at is not None and token.expires_at < timestamp(self._clock.now())):
            return None
        return token


def _add(transaction: Transaction, token: Token) -> None:
    """Add a token, unless a crash came between that and the end of its file."""
    if rows.rows.get(transaction.connection, token.id) is None:
        rows.rows.insert(transaction, token)
