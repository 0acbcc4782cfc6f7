"""The two commands of a round of a transfer, one to either end: asked, waited for, given up, and why they failed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from common.commands import ReceiveContainer, SendContainer
from common.errors import Cancelled, Unauthorized, Unavailable, Unreachable
from common.messages import Outcome
from controller.operations.kinds import Context, Heard

LAST_WORDS = 3.0
"""Seconds in which the other end says by itself how it ended, before it is asked to give up."""
LOOK_EVERY = 1.0
AGAIN_AFTER = 5.0
"""Seconds in which a target says that it has everything, once its source has said that it was taken."""
MOST_TRIES = 10
END_TIME = 30.0
"""Seconds that one end has to say how it ended when the other has failed; its node may be out of reach."""


class Asked:
    """A command to one end of a round, and how it ended; asked again it is another command of the same content."""

    def __init__(
        self,
        context: Context,
        node: str,
        part: str,
        arguments: SendContainer | ReceiveContainer,
        generation: int,
        heard: Heard,
    ) -> None:
        self.tries = 0
        self._context = context
        self._node = node
        self._part = part
        self._arguments = arguments
        self._generation = generation
        self._heard = heard
        self.ask()

    def ask(self) -> None:
        """Have it done, once more."""
        self.tries += 1
        part = self._part if self.tries == 1 else f"{self._part}~{self.tries}"
        call = self._context.command(self._node, self._arguments, self._generation, part, self._heard)
        self.ending = asyncio.ensure_future(call)
        self._said = part

    def give_up(self) -> None:
        """Have the node give it up, unless it has ended."""
        if not self.ending.done():
            self._context.give_up(self._node, self._said)

    @property
    def reachable(self) -> bool:
        """Whether its node answers."""
        live = self._context.resources.fleet.nodes.get(self._node)
        return live is not None and live.reachable

    @property
    def succeeded(self) -> bool:
        """Whether it has ended well."""
        ending = self.ending
        return ending.done() and not ending.cancelled() and ending.exception() is None

    @property
    def unreachable(self) -> bool:
        """Whether it has ended since there is no way."""
        ending = self.ending
        return ending.done() and not ending.cancelled() and isinstance(ending.exception(), Unreachable)


async def first_word(source: Asked, target: Asked, patience: float | None = None) -> None:
    """Wait until one end has failed, or all has been received: whole, since a cut stream never looks complete.

    Either may be at it again after a restart of its agent. Nobody waits for a source then, which would wait in vain for
    a target that has everything. A target that could not say in time that it has everything is sent the round again.
    `patience`: seconds for which the target may be out of reach; None: as long as the source waits for it.
    """
    now = asyncio.get_running_loop().time
    seen = now()
    while patience is None or now() < seen + patience:
        seen = now() if target.reachable else seen
        await asyncio.wait([source.ending, target.ending], return_when=asyncio.FIRST_COMPLETED, timeout=LOOK_EVERY)
        if target.ending.done() or (source.ending.done() and not source.succeeded):
            return
        if source.succeeded:
            await asyncio.wait([target.ending], timeout=AGAIN_AFTER)
            if not target.ending.done() and target.reachable and source.tries < MOST_TRIES:
                source.ask()


async def last_words(source: Asked, target: Asked) -> None:
    """One end has ended: let the other say how, and have it give up when it does not."""
    ends = [source.ending, target.ending]
    if not (source.unreachable or target.unreachable):
        await asyncio.wait(ends, timeout=LAST_WORDS)
    for one in (source, target):
        one.give_up()
    # What has been received is whole, whatever becomes of its source; and who is out of reach says nothing.
    there = [one.ending for one in (source, target) if one.reachable or one.ending.done()]
    if there:
        await asyncio.wait(there, timeout=LAST_WORDS if target.succeeded else END_TIME)


def raise_cause(ends: Sequence[asyncio.Future[Outcome]]) -> None:
    """Raise the failure of an end, if there is one: a cause before the broken connection that it led to."""
    errors = [one.exception() for one in ends if one.done() and not one.cancelled()]
    failures = sorted((error for error in errors if error is not None), key=_rank)
    if failures:
        raise failures[0]
    if not all(one.done() and not one.cancelled() for one in ends):
        raise Unavailable("one end of the transfer did not say how it ended")


def _rank(error: BaseException) -> int:
    """What failed by itself, that there is no way, and then what either may have led to."""
    if isinstance(error, Unreachable):
        return 1
    return 2 if isinstance(error, Unavailable | Cancelled | Unauthorized) else 0
