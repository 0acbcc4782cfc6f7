"""What the dispatcher tells the rest of the controller, and what it needs from the wire below it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from common.messages import Hello, Inventory, Samples, StateChanged
from common.states import NodeStatus

Receive = Callable[[bytes, str, bytes], None]
"""Takes a message: the connection that it came on, the CURVE public key (Z85) that sent it, its bytes."""


class Witness(Protocol):
    """Compares what agents have seen of the controller with what it knows itself."""

    @property
    def commit(self) -> int:
        """The number of the last commit, for agents to remember; 0 when commits are not numbered."""
        ...

    def objection(self, node: str, hello: Hello) -> str | None:
        """Why an agent cannot be let in for the moment: it has seen more than the controller. None: it may come in."""
        ...


class NoWitness:
    """Numbers nothing and believes everybody."""

    commit = 0

    def objection(self, node: str, hello: Hello) -> str | None:
        """None."""
        del node, hello
        return None


class LinkListener(Protocol):
    """Hears what nodes report. All calls come on the event loop and must not block it; for one node, in order."""

    def hello(self, node: str, hello: Hello) -> None:
        """An agent of the node was let in; its inventory comes next."""
        ...

    def inventory(self, node: str, inventory: Inventory) -> Mapping[str, int] | Awaitable[Mapping[str, int]]:
        """All that the node has. Returns id to generation of the containers that belong to it.

        It must be believed before the call returns, since results that come after it do not wait for the rest.
        A failure ends the session: the agent comes back and reports again.
        """
        ...

    def samples(self, node: str, samples: Samples) -> None:
        """New figures."""
        ...

    def state_changed(self, node: str, change: StateChanged) -> None:
        """A container changed by itself or by hand."""
        ...

    def node_status(self, node: str, status: NodeStatus, reason: str) -> None:
        """The node became Online, Suspect or Offline. An enrolled node begins as Offline without a call.

        Also called with an unchanged status when another agent holds the node's key, and when none does any more;
        `reason` then says so.
        """
        ...


class Transport(Protocol):
    """Moves bytes between the controller and whoever holds an allowed key. `Router` is the real one."""

    def start(self, receive: Receive) -> None:
        """Begin to listen; every message is handed to `receive`."""
        ...

    def allow(self, key: str) -> None:
        """Let in the holder of this public key (Z85)."""
        ...

    def deny(self, key: str) -> None:
        """Shut out the holder of this key: at once, for connections that stand too."""
        ...

    def send(self, connection: bytes, payload: bytes) -> bool:
        """Queue a message without waiting; False when the connection is gone or its queue is full."""
        ...

    def drain(self, limit: int) -> None:
        """Hand over what has arrived by now, at most `limit` messages."""
        ...

    def close(self) -> None:
        """Stop listening."""
        ...
