"""How large a body may be. Tornado cuts the connection of a larger one; a caller of this API is answered 413.

What is over the limit is read and thrown away, up to a bound, because a connection that is closed while its caller
still sends is reset, and the answer is lost.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
)

MAX_BODY = 1024 * 1024
MAX_DISCARDED = 256 * MAX_BODY
UNLIMITED = 2**62
STREAM_TIMEOUT = 6 * 3600.0
"""Seconds which an image's upload or a container's data may take."""


class Bounded(HTTPMessageDelegate):
    """Passes a request on to `inside`, or to `refusing` once its body is larger than MAX_BODY."""

    def __init__(self, request: HTTPServerRequest, inside: HTTPMessageDelegate, refusing: HTTPMessageDelegate) -> None:
        self._request = request
        self._inside = inside
        self._refusing = refusing
        self._size = 0

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        if may_discard(self._request):
            return self._inside.headers_received(start_line, headers)
        # Too much to be read to its end: the answer goes out first, and the connection is closed after it.
        self._size = UNLIMITED
        self._refusing.finish()
        return None

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        self._size += len(chunk)
        return self._inside.data_received(chunk) if self._size <= MAX_BODY else None

    def finish(self) -> None:
        (self._inside if self._size <= MAX_BODY else self._refusing).finish()

    def on_connection_close(self) -> None:
        self._inside.on_connection_close()


def expect_stream(request: HTTPServerRequest) -> None:
    """Let this request's body be as long and take as long as images and containers do; its reader counts."""
    connection: Any = request.connection
    connection.set_max_body_size(UNLIMITED)
    connection.set_body_timeout(STREAM_TIMEOUT)


def may_discard(request: HTTPServerRequest) -> bool:
    """Whether this request's body is small enough to be read to no purpose; the connection is told either way."""
    connection: Any = request.connection
    fits = declared_length(request.headers) <= MAX_DISCARDED
    connection.set_max_body_size(MAX_DISCARDED if fits else UNLIMITED)
    return fits


def declared_length(headers: HTTPHeaders) -> int:
    """Bytes of the body by its Content-Length; 0 when it says none, or nothing that is a number."""
    text = headers.get("Content-Length", "")
    return int(text[:20]) if text.isascii() and text.isdigit() else 0
