"""Commands to nodes and their results: delivery at least once, until the result, the deadline or the node's removal.

Everything runs on the event loop and nothing waits for a slow agent: what cannot be sent now is sent by a later tick.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from common.clock import Clock
from common.codec import decode_from_controller, encode
from common.commands import AnyArguments, Arguments
from common.errors import Conflict, DeadlinePassed, Fenced, NotFound, Unavailable, VzfleetError
from common.messages import Command, Ping, Progress, Result
from common.states import NodeStatus
from common.tasks import Tasks
from controller.dispatch.calls import Call
from controller.dispatch.drops import Drops
from controller.dispatch.inbox import Inbox
from controller.dispatch.listener import LinkListener, NoWitness, Transport, Witness
from controller.dispatch.peer import Peer, Sender
from controller.dispatch.sessions import LinkSettings, Watch


class Dispatcher:
    """The controller's side of the conversation with all agents.

    `epoch` grows with each start of the controller and fences the commands of its earlier lives. Nodes are known in
    memory only: enrol them all before `start`. `over` says whether nobody will ever ask for a command's result again.
    """

    def __init__(
        self,
        *,
        router: Transport,
        clock: Clock,
        epoch: int,
        settings: LinkSettings,
        listener: LinkListener,
        over: Callable[[str], bool] = lambda _command: False,
        witness: Witness | None = None,
    ) -> None:
        self.drops = Drops(clock)
        self._router = router
        self._clock = clock
        self._settings = settings
        self._sender = Sender(router, settings, epoch)
        self._peers: dict[str, Peer] = {}
        self._by_key: dict[str, Peer] = {}
        self._tasks = Tasks("dispatcher")
        self._witness = witness or NoWitness()
        self._inbox = Inbox(self._by_key, self._sender, listener, clock, self.drops, self._tasks, over, self._witness)
        self._watch = Watch(settings, clock.monotonic())
        self._ping_at = clock.monotonic()
        self._pings = 0

    def start(self) -> None:
        """Listen, judge nodes and send what is due, until `close`. Raises what the router does when it cannot bind."""
        self._router.start(self._inbox.receive)
        self._watch = Watch(self._settings, self._clock.monotonic())
        self._tasks.start(self._run(), "tick")

    async def close(self) -> None:
        """Stop. Calls are left waiting (whoever waits is stopping too); their commands go on at the agents."""
        await self._tasks.close()
        self._router.close()

    def raise_epoch(self, epoch: int) -> None:
        """Go on under a higher epoch, which is durable already."""
        self._sender.epoch = max(self._sender.epoch, epoch)

    # ------------------------------------------------------------ nodes

    def enrol(self, node: str, public_key: str) -> None:
        """Let in the holder of this CURVE key (Z85) as this node; a new key replaces the node's old one.

        Raises InvalidRequest for what is no key, Conflict when another node has it.
        """
        owner = self._by_key.get(public_key)
        if owner is not None and owner.name != node:
            raise Conflict(f"this key belongs to node {owner.name}", field="key")
        self._router.allow(public_key)
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = Peer(node, public_key, self._sender)
        elif peer.key != public_key:
            self._shut_out(peer, "it has joined with a new key")
            peer.key = public_key
        self._by_key[public_key] = peer

    def remove(self, node: str) -> None:
        """Forget a node: from now on nothing is accepted from it or sent to it. Its calls fail with Unavailable."""
        peer = self._peers.pop(node, None)
        if peer is not None:
            self._shut_out(peer, "the node was removed")
            peer.fail(Unavailable(f"node {node} was removed"))

    def fence(self, node: str, reason: str) -> None:
        """Its host is off: end its session, and its calls, those under way and those to come, with Fenced."""
        peer = self._peers.get(node)
        if peer is not None:
            peer.fenced = reason
            peer.link.fence(reason)
            peer.fail(Fenced(reason))

    def unfence(self, node: str) -> None:
        """It is back: commands may go to it again, once its inventory is processed."""
        peer = self._peers.get(node)
        if peer is not None:
            peer.fenced = ""

    def connected(self, node: str) -> bool:
        """Whether an agent of the node has a session, be its inventory processed or not."""
        peer = self._peers.get(node)
        return peer is not None and peer.link.session is not None

    def _shut_out(self, peer: Peer, reason: str) -> None:
        del self._by_key[peer.key]
        peer.shut_out(reason)

    def status(self, node: str) -> tuple[NodeStatus, str]:
        """How the node is seen now, and why when it is not Online. Raises NotFound."""
        peer = self._peers.get(node)
        if peer is None:
            raise NotFound(f"no node {node}")
        return peer.link.status, peer.link.reason

    # ------------------------------------------------------------ commands

    async def call(
        self,
        node: str,
        arguments: Arguments,
        *,
        command: str,
        generation: int,
        deadline: float,
        request: str = "",
        progress: Callable[[Progress], None] | None = None,
        early: bool = False,
    ) -> Result:
        """Have a command carried out, however often the connection breaks, and return its result.

        `command` is its id for ever (a repeated one is answered from the agent's journal), `deadline` a moment of the
        clock's monotonic time. Waits while the node is out of reach; an `early` command goes out before the node's
        inventory is processed, and to a fenced node. Raises the error that the agent answers with, DeadlinePassed,
        Unavailable when the node is not or no longer enrolled, Fenced, InvalidRequest or TooLarge for what no agent
        would accept. Cancelling it forgets the call, not what the agent does.
        """
        peer = self._peers.get(node)
        if peer is None:
            raise Unavailable(f"node {node} is not enrolled")
        if peer.fenced and not early:
            raise Fenced(peer.fenced)
        if command in peer.calls:
            raise RuntimeError(f"command {command} is called twice at once")
        now = self._clock.monotonic()
        if now >= deadline:
            raise DeadlinePassed(f"no time was left for the command on node {node}")
        allowed = cast(AnyArguments, arguments)
        sample = Command(command, self._sender.epoch, "", generation, now, allowed, request)
        decode_from_controller(encode(sample))
        ended: asyncio.Future[Result | VzfleetError] = asyncio.get_running_loop().create_future()
        call = Call(command, allowed, generation, deadline, request, _settle(ended), progress, early)
        peer.calls[command] = call
        try:
            peer.send_call(call, now)
            outcome = await ended
        finally:
            del peer.calls[command]
        if isinstance(outcome, VzfleetError):
            raise outcome
        return outcome

    def abandon(self, node: str, command: str) -> None:
        """Have a command that is under way given up; its call ends with its result, mostly Cancelled."""
        peer = self._peers.get(node)
        if peer is not None and command in peer.calls:
            peer.abandon(peer.calls[command])

    def acknowledge(self, node: str, commands: Sequence[str]) -> None:
        """The results of these commands are committed: its agent is told, now or when it is back."""
        peer = self._peers.get(node)
        if peer is not None:
            peer.acknowledge(commands)

    # ------------------------------------------------------------ time

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.tick)
            self.tick()

    def tick(self) -> None:
        """Hear what has arrived, judge every node by it, then send what is due and end what is overdue."""
        # The router hears its peers in turn: with this many reads each that has sent anything is heard.
        self._router.drain(2 * len(self._peers) + 256)
        now = self._clock.monotonic()
        gap = self._watch.gap(now)
        ping = self._next_ping(now)
        for peer in list(self._peers.values()):
            try:
                peer.link.excuse(gap, now)
                self._inbox.pass_over(peer, now)
                self._inbox.judge(peer, now)
                if ping is not None:
                    peer.ping(ping)
                peer.attend(now)
            except Exception as error:
                self.drops.count("tick failed", failure=error, node=peer.name)

    def _next_ping(self, now: float) -> Ping | None:
        if now < self._ping_at:
            return None
        self._ping_at = now + self._settings.heartbeat_interval
        self._pings += 1
        return Ping(self._pings, self._witness.commit)


def _settle(future: asyncio.Future[Result | VzfleetError]) -> Callable[[Result | VzfleetError], None]:
    def settle(outcome: Result | VzfleetError) -> None:
        if not future.done():
            future.set_result(outcome)

    return settle
