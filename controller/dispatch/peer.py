"""One node as the dispatcher sees it: its session, the commands under way to it, and how to send to it."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.codec import encode
from common.errors import VzfleetError
from common.messages import Abandon, ControllerMessage, Inventory, Ping, ResultAcknowledged, Samples, StateChanged
from controller.dispatch.calls import Acknowledgements, Call
from controller.dispatch.listener import Transport
from controller.dispatch.sessions import LinkSettings, NodeSession, Session

_ACKNOWLEDGED_AT_ONCE = 1000
Report = Inventory | Samples | StateChanged


@dataclass
class Sender:
    """What all peers send with. `epoch` fences the commands of the controller's earlier lives; it only grows."""

    transport: Transport
    settings: LinkSettings
    epoch: int

    def to(self, connection: bytes, message: ControllerMessage) -> bool:
        """Queue a message without waiting; False when that cannot be."""
        return self.transport.send(connection, encode(message))


@dataclass
class Peer:
    """A node. `deferred` holds what came while its inventory was processed, `refused` whom it was last told to go.

    `unasked` are commands whose results came while nobody waited for them, oldest first; `fenced` says why nothing is
    asked of it, and is empty while it is.
    """

    name: str
    key: str
    sender: Sender
    link: NodeSession = field(init=False)
    calls: dict[str, Call] = field(default_factory=dict)
    acknowledgements: Acknowledgements = field(default_factory=Acknowledgements)
    processing: bool = False
    deferred: deque[tuple[Session, Report]] = field(default_factory=deque)
    refused: tuple[bytes, float] | None = None
    unasked: dict[str, None] = field(default_factory=dict)
    fenced: str = ""

    def __post_init__(self) -> None:
        self.link = NodeSession(self.sender.settings, lambda: uuid.uuid4().hex)

    def send_call(self, call: Call, now: float) -> None:
        """Send one command if the node takes commands and it is due; what is not queued now is due again soon."""
        session = self.link.session
        if session is not None and (session.ready or call.early) and call.due(session, now):
            self.sender.to(session.connection, call.message(session, self.sender.epoch, self.sender.settings, now))

    def abandon(self, call: Call) -> None:
        """Ask the node to give a command up; asked again at every tick until its result has come."""
        call.abandoned = True
        session = self.link.session
        if session is not None and session.ready:
            self.sender.to(session.connection, Abandon(call.command))

    def attend(self, now: float) -> None:
        """End what is overdue and send what is due."""
        for call in self.calls.values():
            if now >= call.deadline:
                call.done(call.overdue(self.name))
            elif call.abandoned:
                self.abandon(call)
            else:
                self.send_call(call, now)
        self.send_acknowledgements()

    def ping(self, ping: Ping) -> None:
        """Tell its agent that the controller lives."""
        if self.link.session is not None:
            self.sender.to(self.link.session.connection, ping)

    def acknowledge(self, commands: Sequence[str]) -> None:
        """Tell its agent, now or when it is back, that these results are committed."""
        self.acknowledgements.add(commands)
        self.send_acknowledgements()

    def send_acknowledgements(self) -> None:
        """Send the acknowledgements that wait."""
        session = self.link.session
        while session is not None and (batch := self.acknowledgements.take(_ACKNOWLEDGED_AT_ONCE)):
            if not self.sender.to(session.connection, ResultAcknowledged(tuple(batch))):
                self.acknowledgements.add(batch)
                return
            self.acknowledgements.sent(batch)

    def shut_out(self, reason: str) -> None:
        """Accept nothing more and send nothing more until its agent is let in anew."""
        self.sender.transport.deny(self.key)
        self.link.shut_out(reason)
        self.deferred.clear()

    def fail(self, error: VzfleetError) -> None:
        """End all its calls with this error."""
        for call in self.calls.values():
            call.done(error)
