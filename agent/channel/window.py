"""One direction of a channel, without I/O: what was written and not yet read at the other end, and what has arrived.

Offsets count bytes from the beginning; the end of a direction counts as one more. At most WINDOW bytes are under way:
the sender keeps them until the other end's user has read them, and after a cut sends them again from where the other
end says that it has them (go-back-N). That bounds the memory of both ends, whatever the other one does.
"""

from __future__ import annotations

from collections import deque

WINDOW = 4 * 1024 * 1024
"""Bytes that are written and not read, at most. The same at both ends: it is part of the protocol."""
FRAME = 256 * 1024
"""Bytes in a frame at most."""


class Violation(Exception):
    """The other end does not keep to the protocol; the text says how."""


class _Buffer:
    """Bytes in a row. Small pieces are joined, so that their number is bounded by the bytes they hold."""

    def __init__(self) -> None:
        self.begin = 0
        self.end = 0
        self._chunks: deque[bytes | bytearray] = deque()

    def append(self, data: bytes) -> None:
        """Bytes come to the end; at most FRAME at once."""
        last = self._chunks[-1] if self._chunks else None
        if isinstance(last, bytearray) and len(last) + len(data) <= FRAME:
            last += data
        else:
            self._chunks.append(bytearray(data) if len(data) < FRAME // 2 else data)
        self.end += len(data)

    def pop(self) -> bytes:
        """Take the first piece away."""
        chunk = self._chunks.popleft()
        self.begin += len(chunk)
        return bytes(chunk)

    def drop(self, offset: int) -> None:
        """Forget whole pieces before `offset`."""
        while self._chunks and self.begin + len(self._chunks[0]) <= offset:
            self.begin += len(self._chunks.popleft())

    def piece(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on, at most `size`, as many as lie together."""
        begin = self.begin
        for chunk in self._chunks:
            if offset < begin + len(chunk):
                if offset == begin and len(chunk) <= size:
                    return bytes(chunk)
                with memoryview(chunk) as view:
                    return bytes(view[offset - begin : offset - begin + size])
            begin += len(chunk)
        return b""


class Outbound:
    """What this end sends."""

    def __init__(self) -> None:
        self._kept = _Buffer()
        self._next = 0
        self._furthest = 0
        self._finished = False
        self.acknowledged = 0
        """What the other end's user has read; its end included."""

    @property
    def room(self) -> int:
        """Bytes that may be written now."""
        return WINDOW - (self._kept.end - min(self.acknowledged, self._kept.end))

    @property
    def written(self) -> int:
        """Bytes written so far."""
        return self._kept.end

    @property
    def done(self) -> bool:
        """Whether the other end has read all, and the end."""
        return self._finished and self.acknowledged == self._kept.end + 1

    def append(self, data: bytes) -> None:
        """Take bytes to be sent: no more than there is room for, and no more than FRAME."""
        if self._finished:
            raise ValueError("the direction was ended")
        if len(data) > self.room:
            raise ValueError("there is no room in the window")
        self._kept.append(data)

    def finish(self) -> None:
        """No more bytes will come."""
        self._finished = True

    def take(self, size: int = FRAME) -> tuple[int, bytes] | None:
        """The next frame, its offset first; no bytes at the end of the direction, None when there is nothing."""
        offset = self._next
        if offset < self._kept.end:
            data = self._kept.piece(offset, size)
            self._next += len(data)
        elif self._finished and offset == self._kept.end:
            data = b""
            self._next += 1
        else:
            return None
        self._furthest = max(self._furthest, self._next)
        return offset, data

    def has_next(self) -> bool:
        """Whether `take` would give something."""
        return self._next < self._kept.end or (self._finished and self._next == self._kept.end)

    def acknowledge(self, consumed: int) -> None:
        """The other end's user has read so far; an older word is nothing new. Raises Violation."""
        if consumed > self._furthest:
            raise Violation(f"it has read to {consumed}, and only {self._furthest} was sent")
        if consumed > self.acknowledged:
            self.acknowledged = consumed
            self._kept.drop(consumed)
            self._next = max(self._next, consumed)

    def rewind(self, received: int) -> None:
        """After a cut: go on from what the other end has. Raises Violation."""
        if not self.acknowledged <= received <= self._furthest:
            raise Violation(f"it has {received}, which is not between {self.acknowledged} and {self._furthest}")
        self._next = received


class Inbound:
    """What this end receives."""

    def __init__(self) -> None:
        self._waiting = _Buffer()
        self._ended = False
        self.consumed = 0
        """What the user of this end has read; the end included."""

    @property
    def received(self) -> int:
        """What has arrived in a row; the end included."""
        return self._waiting.end + self._ended

    @property
    def arrived(self) -> int:
        """Bytes that have arrived in a row."""
        return self._waiting.end

    @property
    def over(self) -> bool:
        """Whether the user has read the end."""
        return self._ended and self.consumed == self.received

    def take(self, offset: int, data: bytes) -> bool:
        """A frame has arrived (no bytes: the end). What came before is dropped; False when bytes before it are missing.

        Raises Violation when it is more than may be under way, or after the end.
        """
        end = offset + len(data)
        if end > self.consumed + WINDOW:
            raise Violation(f"it sent to {end}, and only {self.consumed} was read")
        have = self._waiting.end
        if self._ended and end > have:
            raise Violation(f"it sent to {end} after its end at {have}")
        if not data and offset < have:
            raise Violation(f"it ended at {offset}, and had sent to {have}")
        if offset > have:
            return False
        if not data:
            self._ended = True
        elif end > have:
            self._waiting.append(data[have - offset :])
        return True

    def read(self) -> bytes | None:
        """The next bytes; none at the end, and None while there is nothing."""
        if self.consumed < self._waiting.end:
            data = self._waiting.pop()
            self.consumed += len(data)
            return data
        if self._ended:
            self.consumed = self.received
            return b""
        return None
