"""A small HTTPS client for bulk data: http.client and ssl, each blocking call in a thread of its own pool.

The controller's certificate is checked against one CA and one fixed name, whatever address it is reached at.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from common.errors import InvalidRequest, Unavailable, VzfleetError, error_from_code
from common.names import has_control_characters

_T = TypeVar("_T")
SERVER_NAME = "vzfleet-controller"
CONNECT_TIMEOUT = 10.0
MAX_THREADS = 48
"""Made as they are needed. A transfer by the relay waits in two of them, and 16 commands may do that at once."""
MAX_ERROR_BODY = 64 * 1024
TRANSPORT_ERRORS = (OSError, http.client.HTTPException)
"""What a broken or refused connection raises; ssl.SSLError and TimeoutError are OSErrors."""


class _ErrorDetails(msgspec.Struct):
    code: str = ""


class _ErrorBody(msgspec.Struct):
    error: str = ""
    metadata: _ErrorDetails | None = None


def pinned_context(ca_pem: str) -> ssl.SSLContext:
    """A TLS context which trusts this CA alone. Raises ssl.SSLError when it is no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=ca_pem)
    return context


def unverified_context() -> ssl.SSLContext:
    """A TLS context which trusts anyone: only for fetching a CA whose hash is known."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def split_api(api: str) -> tuple[str, int]:
    """Host and port of `https://HOST:PORT`. Raises InvalidRequest."""
    rule = "https://HOST:PORT"
    try:
        parts = urlsplit(api)
        host, port = parts.hostname, parts.port or 443
    except ValueError:
        raise InvalidRequest(f"invalid address {api[:200]!r}", field="api", allowed=rule) from None
    if parts.scheme != "https" or not host or parts.path.strip("/") or has_control_characters(api):
        raise InvalidRequest(f"invalid address {api[:200]!r}", field="api", allowed=rule)
    return host, port


class _Connection(http.client.HTTPConnection):
    """A TLS connection whose socket can be shut from another thread at any moment, connecting included."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._context = context
        self._raw: socket.socket | None = None
        self._aborted = False

    def connect(self) -> None:
        failure: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            raw = self._raw = socket.socket(family, kind, protocol)
            try:
                if self._aborted:
                    raise ConnectionAbortedError("the request was cancelled")
                raw.settimeout(CONNECT_TIMEOUT)
                raw.connect(address)
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                wrapped = self._context.wrap_socket(raw, server_hostname=SERVER_NAME)
            except OSError as error:
                raw.close()
                failure = error
                continue
            wrapped.settimeout(self.timeout)
            self._raw = self.sock = wrapped
            return
        raise failure or OSError(f"{self.host} has no address")

    def abort(self) -> None:
        """Wake whichever thread waits on the socket."""
        self._aborted = True
        if self._raw is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._raw, socket.SHUT_RDWR)


class Request:
    """One request and its response."""

    def __init__(self, connection: _Connection, pool: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._pool = pool
        self._response: http.client.HTTPResponse | None = None

    async def call(self, work: Callable[[], _T]) -> _T:
        """Run a blocking call on this request's socket in a thread; cancelled, the connection is cut."""
        running = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._connection.abort()
            # The thread must let go of the connection before anybody closes it.
            await asyncio.gather(running, return_exceptions=True)
            raise

    async def start(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Send the request's head."""

        def send() -> None:
            self._connection.putrequest(method, path)
            for name, value in headers.items():
                self._connection.putheader(name, value)
            self._connection.endheaders()

        await self.call(send)

    async def write(self, data: bytes) -> None:
        """Send bytes of the body as they are."""
        await self.call(lambda: self._connection.send(data))

    async def write_chunk(self, data: bytes) -> None:
        """Send one chunk of a chunked body; empty data is the end of it (RFC 9112, 7.1)."""
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def response(self) -> http.client.HTTPResponse:
        """Wait for the response's head."""
        self._response = await self.call(self._connection.getresponse)
        return self._response

    async def read(self, size: int) -> bytes:
        """Up to `size` bytes of the body, empty at its end. Raises HTTPException when it was cut short."""
        response = self._response
        if response is None:
            raise http.client.ResponseNotReady
        data = await self.call(lambda: response.read(size))
        if not data and response.length:
            raise http.client.IncompleteRead(data, response.length)
        return data

    async def read_some(self, size: int) -> bytes:
        """What has arrived of the body, up to `size` bytes; waits for the first. Empty at its end, as `read`."""
        response = self._response
        if response is None:
            raise http.client.ResponseNotReady
        return await self.call(lambda: response.read1(size))

    def close(self) -> None:
        """Close the connection, with a response that was not read to its end."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    async def error(self) -> VzfleetError:
        """The response's error as the controller's envelope tells it."""
        if self._response is None:
            raise http.client.ResponseNotReady
        status, body = self._response.status, b""
        with contextlib.suppress(*TRANSPORT_ERRORS):
            body = await self.read(MAX_ERROR_BODY)
        try:
            told = msgspec.json.decode(body, type=_ErrorBody)
        except msgspec.MsgspecError:
            told = _ErrorBody()
        text = f"the controller answered {status}: {told.error[:1000] or self._response.reason}"
        code = told.metadata.code if told.metadata else ""
        return error_from_code(code, text) if code else _by_status(status, text)


def _by_status(status: int, text: str) -> VzfleetError:
    known = {400: "invalid", 401: "unauthorized", 403: "forbidden", 404: "not-found", 409: "conflict", 507: "no-space"}
    return error_from_code(known.get(status, Unavailable.code), text)


class HttpsClient:
    """Requests to one server. `timeout` is how long it may be silent, in seconds."""

    def __init__(self, api: str, context: ssl.SSLContext, timeout: float = 30.0) -> None:
        self._host, self._port = split_api(api)
        self._context = context
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="https")

    @asynccontextmanager
    async def request(self, timeout: float | None = None) -> AsyncIterator[Request]:
        """A new connection for one request, closed at the end; the block may raise TRANSPORT_ERRORS."""
        connection = _Connection(self._host, self._port, self._context, timeout or self._timeout)
        request = Request(connection, self._pool)
        try:
            yield request
        finally:
            request.close()

    async def fetch(self, method: str, path: str, body: bytes = b"", limit: int = 1024 * 1024) -> bytes:
        """The whole body of a small answer (JSON in, if any). Raises the controller's error, or Unavailable."""
        headers = {"Content-Length": str(len(body))}
        if body:
            headers["Content-Type"] = "application/json"
        try:
            async with self.request() as request:
                await request.start(method, path, headers)
                await request.write(body)
                response = await request.response()
                if not 200 <= response.status < 300:
                    raise await request.error()
                return await request.read(limit)
        except TRANSPORT_ERRORS as error:
            raise Unavailable(f"https://{self._host}:{self._port} cannot be reached: {error}") from None

    def close(self) -> None:
        """Give the threads back; requests under way are to be cancelled before."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_path(path: str, field: str) -> str:
    """Return `path` if it may stand in a request line, else raise InvalidRequest."""
    if not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path or len(path) > 2048:
        raise InvalidRequest("invalid path", field=field, allowed="a path from /, of printable ASCII")
    return path


def check_token(token: str, field: str) -> str:
    """Return `token` if it may stand in a header, else raise InvalidRequest."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidRequest("invalid token", field=field, allowed="printable ASCII without spaces")
    return token
