"""What a transfer needs of the way between two nodes: a reliable, ordered stream of bytes in both directions."""

from __future__ import annotations

from typing import Protocol

from common.errors import Unavailable


class Restarted(Unavailable):
    """The other end has begun anew (its agent was restarted): what was sent and read so far is void."""


class Channel(Protocol):
    """One end of the way. Bytes come out at the other end complete and in order, or an error is raised.

    All raise Unavailable when the other end is out of reach for too long or has given up, Restarted when it has begun
    anew. A cut of the connection shorter than that is not seen.
    """

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the other end is slower, or the bandwidth limit says so."""
        ...

    async def end(self) -> None:
        """No more bytes will come from here; returns when the other end has read them all."""
        ...

    async def read(self) -> bytes:
        """The next bytes, as many as there are; empty at the other end's end."""
        ...
