"""What crosses a channel: a header of fixed size, and a payload of bounded size. Nothing in it has to be parsed."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

from agent.channel.window import FRAME, Violation
from common.commands import Route

VERSION = 1
NONCE = 16
UNKNOWN = bytes(NONCE)
"""In place of the other end's nonce, while it is not known."""
MAX_REASON = 2000
_HEADER = struct.Struct("!BQQI")
_GREETING = struct.Struct(f"!B{NONCE}s{NONCE}s32s")
HEADER = _HEADER.size


class Kind(IntEnum):
    """What a frame is. `offset` is where its bytes stand, of HELLO what its sender has received."""

    HELLO = 1
    DATA = 2
    END = 3
    ALIVE = 4
    """Nothing but the header: what was read, and that the end lives."""
    ABORT = 5
    """The payload says why."""


_SIZES = {
    Kind.HELLO: (_GREETING.size, _GREETING.size),
    Kind.DATA: (1, FRAME),
    Kind.END: (0, 0),
    Kind.ALIVE: (0, 0),
    Kind.ABORT: (0, MAX_REASON),
}


@dataclass(frozen=True)
class Frame:
    """One frame. `consumed` is what the user of its sender has read of the other direction."""

    kind: Kind
    offset: int
    consumed: int
    payload: bytes = b""

    @property
    def header(self) -> bytes:
        """What goes before the payload."""
        return _HEADER.pack(self.kind, self.offset, self.consumed, len(self.payload))


@dataclass(frozen=True)
class Greeting:
    """The payload of HELLO: this run of the sender, the run of the other end that it knows, and what binds it."""

    nonce: bytes
    known: bytes
    proof: bytes

    def encode(self) -> bytes:
        """As bytes."""
        return _GREETING.pack(VERSION, self.nonce, self.known, self.proof)


def decode(header: bytes, payload: bytes) -> Frame:
    """Raises Violation."""
    kind, offset, consumed, size = _unpack(header)
    if size != len(payload):
        raise Violation(f"a frame has {len(payload)} bytes and says {size}")
    return Frame(kind, offset, consumed, payload)


def payload_size(header: bytes) -> int:
    """How many bytes follow a header. Raises Violation."""
    return _unpack(header)[3]


def _unpack(header: bytes) -> tuple[Kind, int, int, int]:
    if len(header) != HEADER:
        raise Violation(f"a header has {len(header)} bytes instead of {HEADER}")
    number, offset, consumed, size = _HEADER.unpack(header)
    try:
        kind = Kind(number)
    except ValueError:
        raise Violation(f"unknown frame {number}") from None
    least, most = _SIZES[kind]
    if not least <= size <= most:
        raise Violation(f"a {kind.name} of {size} bytes")
    return kind, offset, consumed, size


def decode_greeting(payload: bytes) -> Greeting:
    """Raises Violation."""
    version, nonce, known, proof = _GREETING.unpack(payload)
    if version != VERSION:
        raise Violation(f"it speaks version {version} of this protocol, not {VERSION}")
    return Greeting(nonce, known, proof)


def proof_of(route: Route) -> bytes:
    """What both ends know of this round of this transfer, and nobody else: the token is in it."""
    return hashlib.sha256(f"{route.transfer}\n{route.round}\n{route.token}".encode()).digest()
