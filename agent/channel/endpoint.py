"""One end of a channel, whatever carries its frames: greeting, window, bandwidth, signs of life, and how it fails.

A connection is greeted by the sending end and answered by the receiving one. Both name their nonce, which is new with
each run of an end, and what they have received; from there the other goes on. A nonce that has changed means that the
other end has begun anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections.abc import Callable

from agent.channel.base import Restarted
from agent.channel.frames import MAX_REASON, NONCE, UNKNOWN, Frame, Greeting, Kind, decode_greeting
from agent.channel.rate import Rate
from agent.channel.window import FRAME, WINDOW, Inbound, Outbound, Violation
from common.errors import Unavailable, VzfleetError

log = logging.getLogger(__name__)
SILENCE = 300.0
"""Seconds without a sign of the other end after which it is given up."""
ALIVE_EVERY = 3.0
"""Seconds after which an end says that it lives, when it has nothing else to say."""
HELLO_EVERY = 1.0
LOOK_EVERY = 1.0
LAST_WORD = 5.0
"""Seconds for which the receiving end waits for a sending end that has hung up to say that it has read all."""


class Connection:
    """One connection of an endpoint, as a carrier holds it. An endpoint knows only its newest."""


class Endpoint:
    """Implements Channel for its user. Carriers call `attach`, `take`, `outgoing`, `detach` and `fail`."""

    def __init__(
        self, peer: str, proof: bytes, *, sending: bool, rate: int | None = None, silence: float = SILENCE
    ) -> None:
        """`peer` is the other node's name, for texts; `proof` what binds both ends together; `silence` in seconds."""
        self.peer = peer
        self.proof = proof
        self._sending = sending
        self._silence = silence
        self._now = asyncio.get_running_loop().time
        self._rate = Rate(rate if sending else None, self._now())
        self._nonce = secrets.token_bytes(NONCE)
        self._known = UNKNOWN
        self._out = Outbound()
        self._in = Inbound()
        self._told = 0
        self._connection: Connection | None = None
        self._open = False
        self._greeted = False
        self._hello_at = float("inf")
        self._abort: bytes | None = None
        self._aborted = False
        self._told_why = False
        self._error: VzfleetError | None = None
        self._trouble = ""
        self._heard = self._now()
        self._spoke = self._now()
        self._hung_up = self._now()
        self._idle = False
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()

    # ------------------------------------------------------------ for its user

    @property
    def sent(self) -> int:
        """Bytes written so far."""
        return self._out.written

    @property
    def received(self) -> int:
        """Bytes that have arrived so far."""
        return self._in.arrived

    @property
    def failure(self) -> VzfleetError | None:
        """Why it is of no use any more."""
        return self._error

    @property
    def greeted(self) -> bool:
        """Whether both ends have ever greeted each other."""
        return self._greeted

    async def opened(self) -> None:
        """Wait until both ends have greeted each other. Raises Unreachable, Unavailable."""
        await self._until(lambda: self._greeted)

    async def until_greeted(self, within: float) -> None:
        """Wait for that, for so many seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not self._greeted and self._error is None:
                    self._changed.clear()
                    await self._changed.wait()

    async def write(self, data: bytes) -> None:
        """See Channel."""
        with memoryview(data) as view:
            at = 0
            while at < len(data):
                await self._until(lambda: self._out.room > 0)
                piece = bytes(view[at : at + min(FRAME, self._out.room)])
                self._out.append(piece)
                at += len(piece)
                self._poke()
        self._check()

    async def end(self) -> None:
        """See Channel."""
        self._out.finish()
        self._poke()
        if self._sending:
            await self._until(lambda: self._out.done)
        else:
            await self._until(lambda: self._out.done or (self._in.over and self._gone()))

    async def read(self) -> bytes:
        """See Channel."""
        data = self._in.read()
        if data is None:
            await self._until(lambda: self._in.received > self._in.consumed)
            data = self._in.read() or b""
        if self._ack_due():
            self._poke()
        return data

    def abort(self, reason: str) -> None:
        """Have the other end told that it fails, and why."""
        if not self._told_why and not self._aborted:
            self._aborted = True
            self._abort = reason.encode(errors="replace")[:MAX_REASON]
        self.fail(Unavailable(reason))

    async def flush(self, within: float) -> None:
        """Wait until what is to be said is with the carrier, for so many seconds at most.

        An abort must have been heard: a connection that is closed with data on the way may lose it.
        """
        try:
            async with asyncio.timeout(within):
                while self._open and not (self._idle and (self._told_why or not self._aborted)):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.warning("the other end of a transfer is not told how it ended", extra={"peer": self.peer})

    # ------------------------------------------------------------ for carriers

    def attach(self) -> Connection:
        """A new connection stands; an older one is not heard any more."""
        self._connection = connection = Connection()
        self._open = False
        self._hello_at = self._now() if self._sending else float("inf")
        self._poke()
        return connection

    def detach(self, connection: Connection) -> None:
        """A connection is gone."""
        if self._connection is connection:
            self._connection = None
            self._open = False
            self._hung_up = self._now()
            self._poke()
            self._changed.set()

    def fail(self, error: VzfleetError) -> None:
        """It is of no use any more: all that its user does raises this error. The first one counts."""
        if self._error is None:
            self._error = error
        self._changed.set()
        self._poke()

    def note(self, trouble: str) -> None:
        """Why there is no connection now, to be told should it stay so."""
        self._trouble = f" ({trouble})"

    def take(self, connection: Connection, frame: Frame) -> None:
        """A frame has arrived. Raises Violation, and then it has failed."""
        if connection is not self._connection or (self._error is not None and frame.kind is not Kind.ABORT):
            return
        try:
            self._take(frame)
        except Violation as error:
            self.abort(f"{self.peer} does not keep to the protocol of transfers: {error}")
            raise

    async def outgoing(self, connection: Connection) -> Frame | None:
        """The next frame to be sent on a connection; waits for it. None when the connection is not the current one."""
        while connection is self._connection:
            frame, pause = self._due()
            if frame is not None:
                self._spoke = self._now()
                self._told = frame.consumed
                return frame
            if not self._out.has_next() or self._error is not None:
                self._idle = True
                self._changed.set()
            self._wake.clear()
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                continue
        return None

    # ------------------------------------------------------------ inside

    def _take(self, frame: Frame) -> None:
        self._heard = self._now()
        if frame.kind is Kind.HELLO:
            self._greet(frame, decode_greeting(frame.payload))
            return
        if not self._open:
            raise Violation(f"{frame.kind.name} before a greeting")
        self._out.acknowledge(frame.consumed)
        if frame.kind is Kind.ABORT:
            self._hear_abort(frame.payload)
        elif frame.kind in (Kind.DATA, Kind.END) and not self._in.take(frame.offset, frame.payload):
            raise Violation(f"bytes before {frame.offset} are missing")
        self._changed.set()

    def _hear_abort(self, payload: bytes) -> None:
        """The other end has given up, or has heard that this one has. It is told that it was heard."""
        if not self._aborted:
            self._aborted = True
            self._abort = b""
        self._told_why = True
        reason = "".join(
            character if character.isprintable() else " " for character in payload.decode(errors="replace")
        )
        self.fail(Unavailable(f"{self.peer} gave up: {reason}"))

    def _greet(self, frame: Frame, greeting: Greeting) -> None:
        if not hmac.compare_digest(greeting.proof, self.proof):
            raise Violation("a greeting for something else")
        accepted = self._answered(greeting) if self._sending else self._called(greeting)
        if not accepted:
            return
        self._known = greeting.nonce
        self._out.acknowledge(frame.consumed)
        self._out.rewind(frame.offset)
        self._open = self._greeted = True
        self._trouble = ""
        self._changed.set()
        self._poke()

    def _answered(self, greeting: Greeting) -> bool:
        """Whether an answer is for this run of this end."""
        if self._known not in (UNKNOWN, greeting.nonce):
            self.fail(Restarted(f"{self.peer} has begun anew"))
            return False
        if greeting.known != self._nonce:
            return False
        self._hello_at = float("inf")
        return True

    def _called(self, greeting: Greeting) -> bool:
        """Whether a greeting is for this run of this end. It is answered, unless this end has to begin anew."""
        if greeting.known not in (UNKNOWN, self._nonce):
            # It does not know yet that this end has begun anew; the answer tells it.
            self._hello_at = self._now()
            self._poke()
            return False
        if self._known not in (UNKNOWN, greeting.nonce):
            self.fail(Restarted(f"{self.peer} has begun anew"))
            return False
        self._hello_at = self._now()
        return True

    def _due(self) -> tuple[Frame | None, float]:
        """What is to be sent now, or None and for how many seconds there is nothing."""
        now = self._now()
        if self._error is not None and (self._abort is None or not self._open):
            return None, ALIVE_EVERY
        if now >= self._hello_at:
            self._hello_at = now + HELLO_EVERY if self._sending else float("inf")
            greeting = Greeting(self._nonce, self._known, self.proof)
            return Frame(Kind.HELLO, self._in.received, self._in.consumed, greeting.encode()), 0.0
        if not self._open:
            return None, max(0.0, min(ALIVE_EVERY, self._hello_at - now))
        if self._abort is not None:
            reason, self._abort = self._abort, None
            return Frame(Kind.ABORT, 0, self._in.consumed, reason), 0.0
        return self._due_when_open(now)

    def _due_when_open(self, now: float) -> tuple[Frame | None, float]:
        alive = max(0.0, self._spoke + ALIVE_EVERY - now)
        delay = self._rate.delay(now) if self._out.has_next() else alive
        if self._out.has_next() and delay <= 0:
            taken = self._out.take(self._rate.frame)
            if taken is not None:
                offset, data = taken
                self._rate.spend(len(data))
                return Frame(Kind.DATA if data else Kind.END, offset, self._in.consumed, data), 0.0
        if self._ack_due() or alive <= 0:
            return Frame(Kind.ALIVE, 0, self._in.consumed), 0.0
        return None, min(alive, delay)

    def _ack_due(self) -> bool:
        """Whether the other end should hear what was read: a good part of the window, or the end."""
        news = self._in.consumed - self._told
        return news >= WINDOW // 4 or (news > 0 and self._in.over)

    def _gone(self) -> bool:
        """Whether the other end has hung up. Once it has sent all, nobody can know what else it has heard."""
        return not self._open and self._now() >= self._hung_up + LAST_WORD

    def _poke(self) -> None:
        self._idle = False
        self._wake.set()

    def _check(self) -> None:
        if self._error is not None:
            # A new object each time: one exception must not collect the tracebacks of several tasks.
            raise type(self._error)(self._error.text)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds. Raises why it cannot come to hold."""
        self._check()
        while not condition():
            left = self._heard + self._silence - self._now()
            if left <= 0:
                self.fail(Unavailable(f"nothing was heard of {self.peer} for {self._silence:g} s{self._trouble}"))
            self._check()
            self._changed.clear()
            try:
                async with asyncio.timeout(min(left, LOOK_EVERY)):
                    await self._changed.wait()
            except TimeoutError:
                continue
            self._check()
