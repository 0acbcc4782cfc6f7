"""Two agents that hold one node's key: who may speak for the node, decided from their HELLOs and times alone.

A second agent of the same host is a restart, or a state directory that was copied: the newer speaks, and the older is
fenced as long as the newer lives. Two hosts with one key (a cloned disk, a resumed copy of a virtual machine) cannot
both be the node, and nobody here knows which is: neither is let in until only one of them still asks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from common.messages import Hello

QUIET = 20.0
"""Seconds without a HELLO after which an agent counts as ended: one that is refused asks again every 10 s at most."""
_MOST = 16


@dataclass(frozen=True)
class Claim:
    """The newest HELLO of a host, and when its last one came."""

    hello: Hello
    at: float


@dataclass
class Duplicates:
    """What is known of agents with one key. `reason` says what is wrong, and is empty while nothing is."""

    reason: str = ""
    _replaced: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST))
    _fenced_at: float = float("-inf")
    _claims: dict[str, Claim] = field(default_factory=dict)
    """The hosts that are kept out, by what they are known by; empty while none is."""
    _copied_at: float = float("-inf")

    def replaced(self, instance: str) -> None:
        """A newer run of the agent speaks now."""
        if instance not in self._replaced:
            self._replaced.append(instance)

    def fenced(self, hello: Hello, now: float) -> bool:
        """Whether this agent had its time: a newer one of its host took over. To be asked while the newer lives."""
        if hello.instance not in self._replaced:
            return False
        self._fenced_at = now
        self.reason = f"a second agent of {_shown(host_of(hello))} has this node's key: it is shut out, end it"
        return True

    def quarantine(self, inside: Hello, outside: Hello, now: float) -> None:
        """Keep both out: the one that was in and the one that came."""
        self._claims = {host_of(inside): Claim(inside, now)}
        self._note(outside, now)
        hosts = " and ".join(_shown(host) for host in self._claims)
        twins = hosts if len(self._claims) > 1 else f"copies of {hosts}"
        self.reason = f"two agents have this node's key ({twins}): neither is let in, end one of them"

    def keeps_out(self, hello: Hello, now: float) -> bool:
        """Whether the quarantine still holds for this agent, now that it asks; it ends when nobody else does."""
        if not self._claims:
            return False
        self._note(hello, now)
        others = (claim.at for host, claim in self._claims.items() if host != host_of(hello))
        if now - max(self._copied_at, *others, float("-inf")) < QUIET:
            return True
        self._claims, self.reason = {}, ""
        return False

    def settle(self, now: float) -> None:
        """Forget a fenced agent that has not been heard for a while."""
        if not self._claims and now - self._fenced_at >= QUIET:
            self.reason = ""

    def _note(self, hello: Hello, now: float) -> None:
        host = host_of(hello)
        known = self._claims.get(host)
        if known is not None and known.hello.instance == hello.instance and hello.connection <= known.hello.connection:
            if hello != known.hello:
                # No agent uses a number twice: there are two copies of this one's memory.
                self._copied_at = now
            hello = known.hello
        if known is not None or len(self._claims) < _MOST:
            self._claims[host] = Claim(hello, now)


def host_of(hello: Hello) -> str:
    """What a host is known by: its machine-id, or its boot where it has none."""
    return hello.machine_id or hello.boot_id


def _shown(host: str) -> str:
    return f"host {host[:12]}"
