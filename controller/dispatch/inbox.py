"""What agents say: each message is checked, dropped or handed to whom it concerns. Nothing raised here leaves it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence

from common.clock import Clock
from common.codec import decode_from_agent
from common.errors import InvalidRequest, TooLarge, Unavailable
from common.messages import (
    PROTOCOL,
    Accepted,
    AgentMessage,
    Confirm,
    FromAgent,
    Heartbeat,
    Hello,
    Inventory,
    Progress,
    Refused,
    Result,
    Samples,
    StateChanged,
    Welcome,
)
from common.tasks import Tasks
from controller.dispatch.calls import ending
from controller.dispatch.drops import Drops
from controller.dispatch.listener import LinkListener, Witness
from controller.dispatch.peer import Peer, Report, Sender
from controller.dispatch.sessions import Refusal, Session

_MAX_UNASKED = 1000
_MAX_DEFERRED = 1000


class Inbox:
    """Handles the messages of all agents. `peers` maps CURVE public keys (Z85) to nodes and is kept by its owner."""

    def __init__(
        self,
        peers: Mapping[str, Peer],
        sender: Sender,
        listener: LinkListener,
        clock: Clock,
        drops: Drops,
        tasks: Tasks,
        over: Callable[[str], bool],
        witness: Witness,
    ) -> None:
        self._peers = peers
        self._sender = sender
        self._listener = listener
        self._clock = clock
        self._drops = drops
        self._tasks = tasks
        self._over = over
        self._witness = witness

    def receive(self, connection: bytes, key: str, payload: bytes) -> None:
        """Take a message; whatever is wrong with it is counted and goes no further."""
        peer = self._peers.get(key)
        if peer is None:
            return self._drops.count("key of no node", key=key)
        try:
            self._handle(peer, connection, decode_from_agent(payload))
        except (InvalidRequest, TooLarge) as error:
            self._drops.count("malformed", node=peer.name, error=error.text)
        except Exception as error:
            self._drops.count("failed", failure=error, node=peer.name)
        return None

    def judge(self, peer: Peer, now: float) -> None:
        """Settle the node's status for this moment, and say when it changed."""
        if peer.link.judge(now):
            self._listener.node_status(peer.name, peer.link.status, peer.link.reason)

    def _handle(self, peer: Peer, connection: bytes, message: AgentMessage) -> None:
        now = self._clock.monotonic()
        if isinstance(message, Hello):
            return self._hello(peer, connection, message, now)
        session = peer.link.heard(connection, now)
        if session is None:
            return self._stray(peer, connection, now)
        if message.session not in ("", session.id):
            return self._drops.count("of another session", node=peer.name)
        return self._handle_all(peer, session, session.arrivals.take(message, now), now)

    def pass_over(self, peer: Peer, now: float) -> None:
        """Go on without a message that has been missing for too long, where later ones wait for it."""
        session = peer.link.session
        if session is not None:
            self._handle_all(peer, session, session.arrivals.overdue(now), now)

    def _handle_all(self, peer: Peer, session: Session, messages: Sequence[FromAgent], now: float) -> None:
        for message in messages:
            try:
                if peer.link.session is session:
                    self._handle_one(peer, session, message, now)
            except Exception as error:
                self._drops.count("failed", failure=error, node=peer.name)

    def _handle_one(self, peer: Peer, session: Session, message: FromAgent, now: float) -> None:
        match message:
            case Heartbeat():
                session.heartbeat(message.sequence, message.monotonic, now)
                self._let_go(peer)
            case Accepted():
                if (call := peer.calls.get(message.command)) is not None:
                    call.accepted = True
            case Progress():
                if (call := peer.calls.get(message.command)) is not None and call.progress is not None:
                    call.progress(message)
            case Result():
                self._result(peer, message)
            case Inventory() | Samples() | StateChanged():
                self._report(peer, session, message)

    # ------------------------------------------------------------ who is there

    def _hello(self, peer: Peer, connection: bytes, hello: Hello, now: float) -> None:
        objection = self._witness.objection(peer.name, hello)
        if objection is not None:
            self._drops.count("hello refused: the agent has seen more", node=peer.name, text=objection)
            self._sender.to(connection, Refused("stale", objection))
            return
        before = peer.link.session
        session = peer.link.hello(connection, hello, now)
        if isinstance(session, Refusal):
            self._drops.count(f"hello refused: {session.code}", node=peer.name, text=session.text)
            self._sender.to(connection, Refused(session.code, session.text))
            return
        settings = self._sender.settings
        welcome = Welcome(
            protocol=min(hello.newest, PROTOCOL),
            node=peer.name,
            epoch=self._sender.epoch,
            session=session.id,
            heartbeat_interval=settings.heartbeat_interval,
            heartbeat_timeout=settings.heartbeat_timeout,
            sample_interval=settings.sample_interval,
            connection=hello.connection,
        )
        self._sender.to(connection, welcome)
        if session is not before:
            self._listener.hello(peer.name, hello)

    def _stray(self, peer: Peer, connection: bytes, now: float) -> None:
        """Have an agent without a session say HELLO, instead of letting it wait for pings that never come."""
        self._drops.count("no session on this connection", node=peer.name)
        if peer.refused is not None:
            last, at = peer.refused
            if last == connection and now - at < self._sender.settings.heartbeat_interval:
                return
        peer.refused = (connection, now)
        self._sender.to(connection, Refused("stale", "there is no session on this connection"))

    # ------------------------------------------------------------ what became of commands

    def _result(self, peer: Peer, result: Result) -> None:
        call = peer.calls.get(result.command)
        if call is None:
            if peer.acknowledgements.repeat(result.command):
                peer.send_acknowledgements()
            elif self._over(result.command):
                # It is of an operation that ended in the controller's earlier life: it would be repeated for ever.
                peer.acknowledge([result.command])
            else:
                self._drops.count("result nobody waits for", node=peer.name, command=result.command)
                peer.unasked[result.command] = None
                if len(peer.unasked) > _MAX_UNASKED:
                    del peer.unasked[next(iter(peer.unasked))]
            return
        outcome = ending(result)
        if outcome is not None:
            call.done(outcome)
        elif result.error is not None:
            self._drops.count("command was late", node=peer.name, command=result.command, text=result.error.text)
            call.refused(result.error.text)

    def _let_go(self, peer: Peer) -> None:
        """Acknowledge the results that nobody waited for and nobody will any more."""
        over = [command for command in peer.unasked if self._over(command)]
        for command in over:
            del peer.unasked[command]
        if over:
            peer.acknowledge(over)

    # ------------------------------------------------------------ what the node has

    def _report(self, peer: Peer, session: Session, report: Report) -> None:
        if peer.processing:
            if len(peer.deferred) < _MAX_DEFERRED:
                peer.deferred.append((session, report))
            else:
                self._drops.count("too much while an inventory is processed", node=peer.name)
        elif isinstance(report, Inventory):
            self._inventory(peer, session, report)
        elif not session.ready:
            self._drops.count("before the inventory", node=peer.name)
        elif isinstance(report, Samples):
            self._listener.samples(peer.name, report)
        elif isinstance(report, StateChanged):
            self._listener.state_changed(peer.name, report)

    def _inventory(self, peer: Peer, session: Session, inventory: Inventory) -> None:
        try:
            answer = self._listener.inventory(peer.name, inventory)
        except Exception as error:
            self._not_processed(peer, session, error)
            return
        if inspect.isawaitable(answer):
            peer.processing = True
            self._tasks.start(self._process(peer, session, answer), f"inventory of {peer.name}")
        else:
            self._processed(peer, session, answer)

    async def _process(self, peer: Peer, session: Session, answer: Awaitable[Mapping[str, int]]) -> None:
        try:
            generations = await answer
        except Exception as error:
            self._not_processed(peer, session, error)
        else:
            self._processed(peer, session, generations)
        finally:
            peer.processing = False
        while peer.deferred and not peer.processing:
            of, report = peer.deferred.popleft()
            if peer.link.session is of:
                self._report(peer, of, report)

    def _processed(self, peer: Peer, session: Session, generations: Mapping[str, int]) -> None:
        now = self._clock.monotonic()
        if not peer.link.inventory_done(session, now):
            return
        self._sender.to(session.connection, Confirm(dict(generations)))
        self.judge(peer, now)
        peer.attend(now)

    def _not_processed(self, peer: Peer, session: Session, error: Exception) -> None:
        """End the session: its agent comes back and reports again."""
        self._drops.count("inventory not processed", failure=error, node=peer.name)
        if peer.link.session is session:
            peer.link.end("the controller could not process its inventory")
            self._sender.to(session.connection, Refused(Unavailable.code, "the inventory could not be processed"))
