"""A TCP proxy between two ends of a test, which cuts, stalls and delays what goes through it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TcpProxy:
    """Forwards connections to `target` on loopback."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.accepted = 0
        self.forwarded = 0
        self.delay = 0.0
        """Seconds that each piece is held back, in both directions."""
        self.refusing = False
        """Whether new connections are closed at once."""
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.serving: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Break all connections now."""
        for writer in self._writers:
            writer.transport.abort()

    def stall(self) -> None:
        """Let nothing through; connections stay."""
        self._flowing.clear()

    def go_on(self) -> None:
        """Let it flow again."""
        self._flowing.set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection in the background."""
        self.accepted += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self.serving.add(task)
        task.add_done_callback(self.serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.refusing:
                return
            try:
                back, there = await asyncio.open_connection("127.0.0.1", self.target)
            except OSError:
                return
            self._writers.add(there)
            ways = [asyncio.ensure_future(self._pipe(reader, there)), asyncio.ensure_future(self._pipe(back, writer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                self._writers.discard(there)
                there.transport.abort()
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._flowing.wait()
                self.forwarded += len(data)
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def tcp_proxy(target: int) -> AsyncIterator[TcpProxy]:
    """A proxy to this port of loopback, on a port of its own."""
    proxy = TcpProxy(target)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.go_on()
        proxy.cut()
        await server.wait_closed()
        await asyncio.gather(*proxy.serving, return_exceptions=True)
