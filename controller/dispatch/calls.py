"""Commands that are under way to one node: pure bookkeeping of what to send when, and how each ends."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from common.commands import AnyArguments
from common.errors import DeadlinePassed, Internal, Stale, VzfleetError, error_from_code
from common.messages import Command, Progress, Result
from controller.dispatch.sessions import LinkSettings, Session

_REMEMBERED = 4096
_FINAL = frozenset({"epoch", "generation"})


@dataclass
class Call:
    """A command and where it stands. `sent_in` is the session it was last sent in, `send_at` when to send it again.

    An `early` one does not wait for the node's inventory to be processed.
    """

    command: str
    arguments: AnyArguments
    generation: int
    deadline: float
    request: str
    done: Callable[[Result | VzfleetError], None]
    progress: Callable[[Progress], None] | None = None
    early: bool = False
    accepted: bool = False
    abandoned: bool = False
    refusal: str = ""
    sent_in: str | None = None
    send_at: float = 0.0

    def refused(self, text: str) -> None:
        """The agent did not begin it because our message was late: it goes out again."""
        self.accepted = False
        self.refusal = text

    def overdue(self, node: str) -> DeadlinePassed:
        """The error of a call whose deadline has passed, with what is known of it."""
        state = "the command was accepted" if self.accepted else self.refusal or "the command was not accepted"
        return DeadlinePassed(f"node {node} did not answer in time: {state}")

    def due(self, session: Session, now: float) -> bool:
        """Whether it has to be sent: never yet in this session, or not accepted in time."""
        if self.abandoned:
            return False
        return self.sent_in != session.id or (not self.accepted and now >= self.send_at)

    def message(self, session: Session, epoch: int, settings: LinkSettings, now: float) -> Command:
        """The command for this session, with a time to live from now, and note that it was sent."""
        if self.sent_in != session.id:
            self.accepted = False
        self.sent_in = session.id
        self.send_at = now + settings.accept_timeout
        expires_at = session.on_agent_clock(min(now + settings.begin_within, self.deadline))
        return Command(
            id=self.command,
            epoch=epoch,
            session=session.id,
            generation=self.generation,
            expires_at=expires_at,
            arguments=self.arguments,
            request=self.request,
        )


class Acknowledgements:
    """Which results are committed: to be told to the agent, and again when it repeats one of them."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._told: OrderedDict[str, None] = OrderedDict()

    def add(self, commands: Iterable[str]) -> None:
        """Have these acknowledged."""
        self._waiting.extend(commands)

    def repeat(self, command: str) -> bool:
        """The agent sent a result nobody waits for: True when it was acknowledged before, which is then said again."""
        known = command in self._told
        if known and command not in self._waiting:
            self._waiting.append(command)
        return known

    def take(self, limit: int) -> Sequence[str]:
        """Up to `limit` commands to acknowledge now."""
        batch, self._waiting = self._waiting[:limit], self._waiting[limit:]
        return batch

    def sent(self, batch: Sequence[str]) -> None:
        """This batch is on its way."""
        for command in batch:
            self._told[command] = None
            self._told.move_to_end(command)
        while len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)


def ending(result: Result) -> Result | VzfleetError | None:
    """How a result ends its call: itself, an error, or None when it says nothing final.

    Stale for the session or the expiry of one of our messages is not final, for the epoch or generation it is.
    """
    error = result.error
    if error is None:
        return result if result.outcome is not None else Internal("the agent answered with neither outcome nor error")
    if result.outcome is not None:
        return Internal("the agent answered with both an outcome and an error")
    if error.code == Stale.code and error.field not in _FINAL:
        return None
    return error_from_code(error.code, error.text, field=error.field, allowed=error.allowed)
