"""One HTTPS request to a server of somebody else's: its answer's head, and its body as it comes.

Nothing is taken for granted of the server: certificate, redirects, pace and size are all bounded by the caller.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from tornado.http1connection import HTTP1Connection, HTTP1ConnectionParameters
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, RequestStartLine, ResponseStartLine
from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpclient import TCPClient

from common import VERSION
from common.errors import InvalidRequest, Unavailable, VzfleetError
from common.names import has_control_characters

MAX_URL = 2048
MAX_REDIRECTS = 5
MAX_HEADER = 64 * 1024
CHUNK = 256 * 1024
UNLIMITED = 2**62
_REDIRECTS = (301, 302, 303, 307, 308)
URL_RULE = f"https://HOST[:PORT]/PATH without user name and fragment, at most {MAX_URL} characters"


class BrokenOff(Exception):
    """The connection failed in a way that another try may mend. Never leaves the code that fetches."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer that is no redirect, and the URL that gave it."""

    status: int
    headers: HTTPHeaders
    url: str


Begin = Callable[[Head], Awaitable[None]]
Take = Callable[[bytes], Awaitable[None]]


def check_url(url: str, field: str = "source.url") -> str:
    """Return a URL that may be fetched, else raise InvalidRequest."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole or len(url) > MAX_URL or not url.isascii() or " " in url or has_control_characters(url):
        raise InvalidRequest(f"invalid URL {url[:200]!r}", field=field, allowed=URL_RULE)
    if parts.username is not None or parts.password is not None or "#" in url or "\\" in url:
        raise InvalidRequest(f"invalid URL {url[:200]!r}", field=field, allowed=URL_RULE)
    return url


def make_context(authorities: Path | None) -> ssl.SSLContext:
    """TLS that trusts the system's authorities, and those in a PEM file. Raises InvalidRequest naming `image_ca`."""
    if authorities is None:
        return _system_context()
    context = _new_context()
    try:
        context.load_verify_locations(cafile=str(authorities))
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(
            f"{authorities} cannot be used: {error}", field="image_ca", allowed="a PEM file of certificates"
        ) from None
    return context


def _new_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@cache
def _system_context() -> ssl.SSLContext:
    """Reading the system's authorities takes 40 ms."""
    return _new_context()


class HttpsClient:
    """Makes requests. `connect_timeout` and `stall` in seconds: the latter is how long nothing at all may come."""

    def __init__(self, context: ssl.SSLContext, connect_timeout: float = 15.0, stall: float = 30.0) -> None:
        self._context = context
        self._connect_timeout = connect_timeout
        self._stall = stall
        self._tcp = TCPClient()

    async def get(self, url: str, headers: Mapping[str, str], begin: Begin, take: Take) -> Head:
        """GET, through redirects. `begin` is told the answer's head, then `take` gets the body, piece by piece.

        What either raises ends the request and is raised. Raises BrokenOff for what may be tried again, Unavailable
        for what will not mend by itself (TLS, a redirect that is not followed).
        """
        for _ in range(MAX_REDIRECTS + 1):
            exchange = await self._exchange(url, headers, begin, take)
            if exchange.target is None:
                return exchange.whole()
            url = _redirected(url, exchange.target)
        raise Unavailable(f"{_host(url)} redirects more than {MAX_REDIRECTS} times")

    async def _exchange(self, url: str, headers: Mapping[str, str], begin: Begin, take: Take) -> _Exchange:
        stream = await self._connect(url)
        try:
            exchange = _Exchange(url, stream, begin, take)
            parameters = HTTP1ConnectionParameters(
                no_keep_alive=True, max_header_size=MAX_HEADER, max_body_size=UNLIMITED, chunk_size=CHUNK
            )
            connection = HTTP1Connection(stream, True, parameters)
            parts = urlsplit(url)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            own = {"Host": parts.netloc, "User-Agent": f"vzfleet/{VERSION}", "Connection": "close"}
            written = HTTPHeaders({**own, "Accept-Encoding": "identity", **headers})
            connection.write_headers(RequestStartLine("GET", target, "HTTP/1.1"), written)
            connection.finish()
            reading = asyncio.ensure_future(connection.read_response(exchange))
            await self._watch(reading, exchange)
            return exchange
        except StreamClosedError as error:
            raise BrokenOff(f"the connection to {_host(url)} was closed: {error.real_error or 'early'}") from None
        finally:
            stream.close()

    async def _watch(self, reading: asyncio.Future[bool], exchange: _Exchange) -> None:
        """Wait for the answer's end; give up when nothing came for too long, or when it is not wanted any more."""
        try:
            while not reading.done():
                seen = exchange.pieces
                both: set[asyncio.Future[Any]] = {reading, exchange.over}
                done, _ = await asyncio.wait(both, timeout=self._stall, return_when="FIRST_COMPLETED")
                if exchange.over.done():
                    return
                if not done and exchange.pieces == seen and not exchange.taking:
                    raise BrokenOff(f"{_host(exchange.url)} sent nothing for {self._stall:g} s")
            reading.result()
        finally:
            reading.cancel()
            exchange.over.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _connect(self, url: str) -> IOStream:
        host, port = _host(url), urlsplit(url).port or 443
        try:
            return await self._tcp.connect(host, port, ssl_options=self._context, timeout=self._connect_timeout)
        except ssl.SSLCertVerificationError as error:
            raise Unavailable(f"the certificate of {host} is not trusted: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise BrokenOff(f"TLS with {host} failed: {error.reason or error}") from None
        except socket.gaierror as error:
            raise BrokenOff(f"the name {host} cannot be resolved: {error.strerror}") from None
        except TimeoutError:
            raise BrokenOff(f"{host} port {port} does not answer within {self._connect_timeout:g} s") from None
        except StreamClosedError as error:
            raise BrokenOff(f"the connection to {host} failed: {error.real_error or 'closed'}") from None
        except OSError as error:
            raise BrokenOff(f"{host} port {port} cannot be reached: {error.strerror or error}") from None


class _Exchange(HTTPMessageDelegate):
    """Hears one answer. `target` is where it redirects to; `over` is done when the rest is not wanted."""

    def __init__(self, url: str, stream: IOStream, begin: Begin, take: Take) -> None:
        self.url = url
        self.target: str | None = None
        self.pieces = 0
        self.taking = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stream = stream
        self._begin = begin
        self._take = take
        self._head: Head | None = None
        self._finished = False
        self._failure: BaseException | None = None

    def whole(self) -> Head:
        """The head of an answer that came to its end. Raises what ended it otherwise."""
        if self._failure is not None:
            raise self._failure
        if self._head is None or not self._finished:
            raise BrokenOff(f"the answer of {_host(self.url)} broke off")
        return self._head

    async def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        status = getattr(start_line, "code", 0)
        self.pieces += 1
        if 100 <= status < 200:
            return
        if status in _REDIRECTS and "Location" in headers:
            self.target = headers["Location"]
            self._end(None)
            return
        self._head = Head(status, headers, self.url)
        await self._guard(self._begin(self._head))

    async def data_received(self, chunk: bytes) -> None:
        self.pieces += 1
        if not self.over.done():
            await self._guard(self._take(chunk))

    async def _guard(self, work: Awaitable[None]) -> None:
        # Tornado logs what its delegates raise as a fault: what ends the request is kept, and raised by `whole`.
        self.taking = True
        try:
            await work
        except (VzfleetError, BrokenOff, OSError) as error:
            self._end(error)
        finally:
            self.taking = False

    def finish(self) -> None:
        self._finished = True

    def _end(self, failure: BaseException | None) -> None:
        self._failure = failure
        if not self.over.done():
            self.over.set_result(None)
        self._stream.close()


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _redirected(url: str, target: str) -> str:
    """Where a redirect leads. Raises Unavailable for what is not fetched."""
    try:
        return check_url(urljoin(url, target.partition("#")[0]))
    except (InvalidRequest, ValueError):
        raise Unavailable(f"{_host(url)} redirects to {target[:200]!r}, which is not followed: only https is") from None
