"""multipart/form-data (RFC 7578, RFC 2046 5.1) as it comes, in bounded memory. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesHeaderParser
from enum import Enum, auto

from common.errors import InvalidRequest

MAX_PART_HEAD = 8192
MAX_BOUNDARY = 70
MAX_PADDING = 128
FIELD = "body"
ALLOWED = "multipart/form-data with a boundary of 1 to 70 characters"


@dataclass(frozen=True)
class Part:
    """The beginning of a part; its bytes follow until the next one begins."""

    name: str
    filename: str


class _State(Enum):
    PREAMBLE = auto()
    DATA = auto()
    DELIMITED = auto()
    HEAD = auto()
    END = auto()


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names. Raises InvalidRequest."""
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_param("boundary")
    if not isinstance(boundary, str) or not boundary.isascii() or not 0 < len(boundary) <= MAX_BOUNDARY:
        raise InvalidRequest("the body's parts cannot be told apart", field="Content-Type", allowed=ALLOWED)
    return boundary.encode()


class Multipart:
    """Takes the body piece by piece and gives its parts, each followed by its bytes."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        # The first delimiter may be the very beginning of the body.
        self._buffer = bytearray(b"\r\n")
        self._state = _State.PREAMBLE

    @property
    def complete(self) -> bool:
        """Whether the last delimiter has come."""
        return self._state is _State.END

    def feed(self, chunk: bytes) -> Iterator[Part | bytes]:
        """What a piece of the body brings. Raises InvalidRequest."""
        self._buffer += chunk
        while True:
            before, size = self._state, len(self._buffer)
            if self._state in (_State.PREAMBLE, _State.DATA):
                data = self._data()
                if data and before is _State.DATA:
                    yield data
            elif self._state is _State.DELIMITED:
                self._delimited()
            elif self._state is _State.HEAD:
                part = self._head()
                if part is not None:
                    yield part
            else:
                self._buffer.clear()
            if self._state is before and len(self._buffer) == size:
                return

    def _data(self) -> bytes:
        """What certainly belongs to the part, up to the next delimiter or what may become one."""
        end = self._buffer.find(self._delimiter)
        if end >= 0:
            data = bytes(self._buffer[:end])
            del self._buffer[: end + len(self._delimiter)]
            self._state = _State.DELIMITED
            return data
        end = max(0, len(self._buffer) - len(self._delimiter) + 1)
        data = bytes(self._buffer[:end])
        del self._buffer[:end]
        return data

    def _delimited(self) -> None:
        if self._buffer.startswith(b"--"):
            self._state = _State.END
            return
        end = self._buffer.find(b"\r\n")
        padding = bytes(self._buffer[: end if end >= 0 else len(self._buffer)])
        if len(padding) > MAX_PADDING or padding.strip(b" \t\r") not in (b"", b"-"):
            raise InvalidRequest("the body's parts are not delimited", field=FIELD, allowed=ALLOWED)
        if end >= 0:
            # The line's end stays: a head may be empty, and then ends with it.
            del self._buffer[:end]
            self._state = _State.HEAD

    def _head(self) -> Part | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end > MAX_PART_HEAD or (end < 0 and len(self._buffer) > MAX_PART_HEAD):
            raise InvalidRequest(
                "the head of a part is too long", field=FIELD, allowed=f"at most {MAX_PART_HEAD} bytes"
            )
        if end < 0:
            return None
        head = BytesHeaderParser().parsebytes(bytes(self._buffer[2 : end + 2]))
        del self._buffer[: end + 4]
        self._state = _State.DATA
        name = head.get_param("name", header="content-disposition")
        if head.get_content_disposition() != "form-data" or not isinstance(name, str):
            raise InvalidRequest("a part of the body has no name", field=FIELD, allowed=ALLOWED)
        return Part(name[:128], (head.get_filename() or "")[:255])
