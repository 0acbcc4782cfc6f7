"""Who speaks for a node, and how alive it is: decided from messages and times alone, without I/O.

A node has one session at most: the newest connection of its agent (rules in `NodeSession.hello`), and none while two
hosts hold its key (rules in `duplicates.py`). It is judged by the silence since its last message. Time during which
the controller itself did not look is not held against anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Struct

from common.errors import InvalidRequest
from common.messages import OLDEST_PROTOCOL, PROTOCOL, Hello
from common.states import NodeStatus
from controller.dispatch.arrivals import Arrivals
from controller.dispatch.duplicates import Duplicates, host_of

MISSED_HEARTBEATS = 3


class LinkSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Times of the link in seconds.

    A node shows Offline at most `heartbeat_timeout` and two `tick`s after its last message. A command has
    `begin_within` seconds to be begun by the agent, and is sent again when it was not accepted within `accept_timeout`.
    """

    heartbeat_interval: float = 1.5
    heartbeat_timeout: float = 8.0
    sample_interval: float = 5.0
    tick: float = 0.5
    begin_within: float = 10.0
    accept_timeout: float = 2.0

    def __post_init__(self) -> None:
        if min(getattr(self, name) for name in self.__struct_fields__) <= 0:
            raise InvalidRequest("every time of the link must be above 0", field="link")
        if self.heartbeat_timeout <= MISSED_HEARTBEATS * self.heartbeat_interval:
            raise InvalidRequest(
                "heartbeat_timeout is too short",
                field="link.heartbeat_timeout",
                allowed=f"more than {MISSED_HEARTBEATS} times heartbeat_interval",
            )


@dataclass(frozen=True)
class Refusal:
    """Why an agent is not let in: `protocol`, `duplicate` or `stale` (no session on this connection: say HELLO)."""

    code: str
    text: str


@dataclass
class Session:
    """An agent that was let in. `offset` is its monotonic clock less ours; `ready` means its inventory is processed."""

    id: str
    connection: bytes
    hello: Hello
    heard: float
    offset: float
    sequence: int = -1
    ready: bool = False
    arrivals: Arrivals = field(default_factory=Arrivals)

    def heartbeat(self, sequence: int, monotonic: float, now: float) -> None:
        """Learn the agent's clock; a repeated or older heartbeat says nothing new."""
        if sequence > self.sequence:
            self.sequence = sequence
            self.offset = monotonic - now

    def on_agent_clock(self, moment: float) -> float:
        """A moment of our monotonic clock as the agent's clock will show it."""
        return moment + self.offset


@dataclass
class NodeSession:
    """The link's state of one node. `reason` tells why it is not Online, or what is wrong all the same."""

    settings: LinkSettings
    new_id: Callable[[], str]
    session: Session | None = None
    status: NodeStatus = NodeStatus.OFFLINE
    reason: str = "no agent has connected yet"
    _online_at: float | None = None
    _duplicates: Duplicates = field(default_factory=Duplicates)
    _newest: Hello | None = None
    """The HELLO of the last session: one of the same run of the agent counts only when its connection is newer."""
    _told: str = ""

    def hello(self, connection: bytes, hello: Hello, now: float) -> Session | Refusal:
        """An agent asks to be let in: its session (a new one, unless this HELLO is a repetition), or why not."""
        if hello.oldest > PROTOCOL or hello.newest < OLDEST_PROTOCOL:
            text = (
                f"the agent speaks protocol {hello.oldest} to {hello.newest}, {OLDEST_PROTOCOL} to {PROTOCOL} is served"
            )
            return Refusal("protocol", text)
        if self._duplicates.keeps_out(hello, now):
            return self._refused_as_duplicate()
        current, newest = self.session, self._newest
        if newest is not None and hello.instance == newest.instance:
            if hello == newest or hello.connection < newest.connection:
                return self._repeated(connection, now)
            if hello.connection == newest.connection:
                return self._quarantine(newest, hello, now)
        elif current is not None and (refusal := self._refuse_second(current, hello, now)) is not None:
            return refusal
        self._newest = hello
        self.session = Session(self.new_id(), connection, hello, heard=now, offset=hello.monotonic - now)
        return self.session

    def _repeated(self, connection: bytes, now: float) -> Session | Refusal:
        """A HELLO came again, or late: it changes nothing."""
        session = self.heard(connection, now)
        return session or Refusal("stale", "a newer connection of this agent is known")

    def _refuse_second(self, current: Session, hello: Hello, now: float) -> Refusal | None:
        """Another run of the agent comes than the one that is in: None when it takes over."""
        if now - current.heard <= MISSED_HEARTBEATS * self.settings.heartbeat_interval:
            if self._duplicates.fenced(hello, now):
                return self._refused_as_duplicate()
            if host_of(hello) != host_of(current.hello):
                return self._quarantine(current.hello, hello, now)
        self._duplicates.replaced(current.hello.instance)
        return None

    def _quarantine(self, known: Hello, hello: Hello, now: float) -> Refusal:
        self._duplicates.quarantine(known, hello, now)
        self._online_at = None
        self.end(self._duplicates.reason)
        return self._refused_as_duplicate()

    def _refused_as_duplicate(self) -> Refusal:
        return Refusal("duplicate", f"{self._duplicates.reason}; each host needs a key of its own: join it anew")

    def heard(self, connection: bytes, now: float) -> Session | None:
        """A message came: the session it belongs to, or None when its connection is not the one that counts."""
        session = self.session
        if session is None or session.connection != connection:
            return None
        session.heard = now
        if session.ready:
            self._online_at = now
        return session

    def inventory_done(self, session: Session, now: float) -> bool:
        """The inventory of this session is processed: commands may go out. False when it is no longer the session."""
        if self.session is not session:
            return False
        session.ready = True
        self._online_at = now
        return True

    def end(self, reason: str) -> None:
        """Forget the session; the agent has to say HELLO again."""
        self.session = None
        self.reason = reason

    def fence(self, reason: str) -> None:
        """Its host is off: Offline at once, until an agent is let in and its inventory is processed."""
        self.end(reason)
        self._online_at = None

    def shut_out(self, reason: str) -> None:
        """Forget the session and who held the key: the next agent comes with another one."""
        self.end(reason)
        self._duplicates = Duplicates()
        self._newest = None

    def excuse(self, seconds: float, now: float) -> None:
        """Do not count this much silence: nobody was looking."""
        if self.session is not None:
            self.session.heard = min(now, self.session.heard + seconds)
        if self._online_at is not None:
            self._online_at = min(now, self._online_at + seconds)

    def judge(self, now: float) -> bool:
        """Settle `status` and `reason` for this moment; True when the status changed, or who else holds the key."""
        self._duplicates.settle(now)
        if self.session is not None and now - self.session.heard >= self.settings.heartbeat_timeout:
            self.end(f"no message for {self.settings.heartbeat_timeout:g} seconds")
        silence = float("inf") if self._online_at is None else now - self._online_at
        waiting = "its agent is connected, its inventory is not processed yet" if self.session else None
        before = (self.status, self._told)
        self._told = self._duplicates.reason
        if silence >= self.settings.heartbeat_timeout:
            self.status, self.reason = NodeStatus.OFFLINE, waiting or self.reason
        elif silence > MISSED_HEARTBEATS * self.settings.heartbeat_interval:
            ready = self.session is None or self.session.ready
            self.status = NodeStatus.SUSPECT
            self.reason = waiting if waiting and not ready else f"no message for {MISSED_HEARTBEATS} heartbeats"
        else:
            self.status, self.reason = NodeStatus.ONLINE, self._told
        return (self.status, self._told) != before


class Watch:
    """Notices that the controller itself stood still: garbage collection, a paused machine, a jump of the clock."""

    def __init__(self, settings: LinkSettings, now: float) -> None:
        self._tick = settings.tick
        self._last = now

    def gap(self, now: float) -> float:
        """Seconds since the last call beyond two ticks; 0 when it came in time."""
        late = now - self._last - 2 * self._tick
        self._last = now
        return max(0.0, late)
