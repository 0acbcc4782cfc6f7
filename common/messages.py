"""Every message between controller and agent, typed; unknown fields are ignored, unknown messages refused.

The protocol number grows when a message changes its meaning; adding a field with a default does not need that.
The controller speaks PROTOCOL and the one before.
"""

from __future__ import annotations

from typing import Any

import msgspec

from common.commands import AnyArguments
from common.reports import (
    ContainerReport,
    ContainerSample,
    Count,
    ImageReport,
    Name,
    NodeFacts,
    NodeSample,
    Record,
    Share,
    Text,
    WireError,
)

PROTOCOL = 1
OLDEST_PROTOCOL = 1


class Hello(Record, frozen=True, tag="hello"):
    """First message of a connection. `boot_id` is the kernel's; `instance` is new with each start of the agent.

    `epoch`, `generation` and `commit` are the highest that the agent has seen of this controller: a controller that
    is behind them has lost rows (0: none seen).
    """

    oldest: Count
    newest: Count
    version: Name
    boot_id: Name
    machine_id: Name
    instance: Name
    connection: Count
    monotonic: float
    epoch: Count = 0
    generation: Count = 0
    commit: Count = 0


class FromAgent(Record, frozen=True, kw_only=True):
    """What an agent says in a session: of which session it is, and the how manieth, from 1.

    A message of another session is dropped, one that comes again too, and all are handled in their order. Agents that
    do not know these fields are heard without (0).
    """

    session: Name = ""
    number: Count = 0


class Inventory(FromAgent, frozen=True, tag="inventory"):
    """All that the node has; answers WELCOME and is repeated every few minutes."""

    facts: NodeFacts
    containers: tuple[ContainerReport, ...]
    images: tuple[ImageReport, ...]


class Heartbeat(FromAgent, frozen=True, tag="heartbeat"):
    """The agent lives. `monotonic` is its clock (the base of `expires_at`), `lag` its event loop's delay in seconds."""

    sequence: Count
    monotonic: float
    lag: float


class Accepted(FromAgent, frozen=True, tag="accepted"):
    """The command stands in the agent's journal and will be carried out or answered with an error."""

    command: Name


class Progress(FromAgent, frozen=True, tag="progress"):
    """How far a command is; `percent` 0 to 100, the rest as far as it is known (bytes, bytes per second, seconds)."""

    command: Name
    stage: Name
    percent: int | None = None
    processed: Count | None = None
    speed: Count | None = None
    total: Count | None = None
    remaining: Count | None = None


class Outcome(Record, frozen=True):
    """What a command led to: the container and its figures after it, or what was transferred, in how many seconds."""

    container: ContainerReport | None = None
    sample: ContainerSample | None = None
    bytes: Count | None = None
    seconds: Share | None = None


class Result(FromAgent, frozen=True, tag="result"):
    """The end of a command. Exactly one of `outcome` and `error` is set. Sent again until it is acknowledged."""

    command: Name
    outcome: Outcome | None = None
    error: WireError | None = None
    sampled_at: float | None = None


class Samples(FromAgent, frozen=True, tag="samples"):
    """The figures of all running containers; `sampled_at` in seconds since 1970 by the agent's wall clock."""

    sampled_at: float
    node: NodeSample
    containers: tuple[ContainerSample, ...]


class StateChanged(FromAgent, frozen=True, tag="state-changed"):
    """A container changed by itself or by hand: it died, stopped, was started or removed on the host."""

    container: ContainerReport
    removed: bool = False


class Welcome(Record, frozen=True, tag="welcome"):
    """Answers the HELLO of this `connection`. `epoch` grows with each start of the controller; times in seconds."""

    protocol: Count
    node: Name
    epoch: Count
    session: Name
    heartbeat_interval: float
    heartbeat_timeout: float
    sample_interval: float
    connection: Count = 0


class Refused(Record, frozen=True, tag="refused"):
    """The controller will not speak with this agent; it says why and closes."""

    code: Name
    text: Text


class Ping(Record, frozen=True, tag="ping"):
    """The controller lives. `commit` is the number of its last commit, to be told again in the next HELLO."""

    sequence: Count
    commit: Count = 0


class ResultAcknowledged(Record, frozen=True, tag="result-acknowledged"):
    """The results of these commands are committed: the agent may forget them."""

    commands: tuple[Name, ...]


class Confirm(Record, frozen=True, tag="confirm"):
    """The controller's word which containers belong to this node: id to generation. Allows autostart."""

    generations: dict[Name, Count]


class Abandon(Record, frozen=True, tag="abandon"):
    """Give this command up if it has not ended; its Result tells how it ended."""

    command: Name


class Command(Record, frozen=True, tag="command"):
    """An order to the agent, carried out at most once for its `id` (`<operation>/<step>/<do or undo>`).

    `expires_at` is on the agent's own monotonic clock: after that it must not begin. A `session`, `epoch` or
    `generation` older than the agent's is refused. `request` is the REST call's id, for the logs.
    """

    id: Name
    epoch: Count
    session: Name
    generation: Count
    expires_at: float
    arguments: AnyArguments
    request: Name = ""


AgentMessage = Hello | Inventory | Heartbeat | Accepted | Progress | Result | Samples | StateChanged
ControllerMessage = Welcome | Refused | Ping | ResultAcknowledged | Confirm | Abandon | Command


def to_plain(message: Any) -> Any:
    """A message as plain maps and lists, ready for msgpack or JSON."""
    return msgspec.to_builtins(message)
