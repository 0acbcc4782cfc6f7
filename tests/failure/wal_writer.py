"""A process that commits numbered rows to a store until it is killed, and tells each once it was answered.

`python -m tests.failure.wal_writer DIRECTORY`: the rows are tokens whose names are numbers.
"""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from pathlib import Path

from controller.records import Token
from controller.store import schema, tokens
from controller.store.db import Database
from controller.store.mark import Mark

AT_ONCE = 3
"""Writers beside each other: some commits hold one row, some several."""
PADDING = "x" * 3000
"""Rows that fill pages: the log is checkpointed every few hundred of them."""


async def write(directory: Path) -> None:
    """Commit until the end."""
    url = f"sqlite:///{directory / 'controller.db'}"
    schema.upgrade(url)
    store = Database(url, lambda _: None, Mark(directory / "store.mark"))
    await store.open()
    numbers = iter(range(10**9))

    async def one() -> None:
        while True:
            # Of this writer alone: what another one's log brings is not taken for it.
            name = f"{directory.name}-{next(numbers)}"
            token = Token(name, name, "viewer", name, PADDING)
            await store.write(partial(tokens.rows.insert, record=token))
            os.write(1, f"{name}\n".encode())

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1])))
