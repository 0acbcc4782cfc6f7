"""Which of two failures of a transfer is told: the cause, not the broken connection that it led to."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from common.errors import DriverFailed, Unauthorized, Unavailable, Unreachable
from common.messages import Outcome
from controller.operations import rounds
from controller.operations.rounds import Asked, first_word, last_words, raise_cause


def ended(result: Outcome | Exception) -> asyncio.Future[Outcome]:
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future


def running() -> asyncio.Future[Outcome]:
    return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("consequence", [Unavailable("broke off"), Unauthorized("unknown token")])
async def test_the_cause_comes_before_its_consequence(consequence: Exception) -> None:
    for ends in ([consequence, DriverFailed("the disk")], [DriverFailed("the disk"), consequence]):
        with pytest.raises(DriverFailed, match="the disk"):
            raise_cause([ended(end) for end in ends])
    with pytest.raises(type(consequence)):
        raise_cause([ended(Outcome()), ended(consequence)])


async def test_both_ends_must_have_said_that_they_are_done() -> None:
    raise_cause([ended(Outcome()), ended(Outcome())])
    silent: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    with pytest.raises(Unavailable, match="did not say"):
        raise_cause([ended(Outcome()), silent])


class Script:
    """An end of a round, in place of `Asked`: how it ends, try for try."""

    reachable = True

    def __init__(self, *endings: asyncio.Future[Outcome]) -> None:
        self._endings = list(endings)
        self.tries = 0
        self.given_up = False
        self.asked_again = asyncio.Event()
        self.ask()

    def ask(self) -> None:
        self.tries += 1
        self.ending = self._endings.pop(0)
        if self.tries > 1:
            self.asked_again.set()

    def give_up(self) -> None:
        self.given_up = not self.ending.done()

    succeeded = Asked.succeeded
    unreachable = Asked.unreachable


def ends(source: Script, target: Script) -> tuple[Asked, Asked]:
    return cast(Asked, source), cast(Asked, target)


async def test_a_sender_that_is_at_it_again_is_not_waited_for() -> None:
    async with asyncio.timeout(5):
        await first_word(*ends(Script(running()), Script(ended(Outcome()))))
        await first_word(*ends(Script(ended(DriverFailed("the disk"))), Script(running())))


async def test_a_receiver_that_is_at_it_again_is_sent_the_round_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "AGAIN_AFTER", 0.01)
    monkeypatch.setattr(rounds, "LAST_WORDS", 0.01)
    source, target = Script(ended(Outcome()), running()), Script(running())
    waiting = asyncio.ensure_future(first_word(*ends(source, target)))
    async with asyncio.timeout(5):
        await source.asked_again.wait()
        assert not waiting.done()
        target.ending.set_result(Outcome())
        await waiting
        await last_words(*ends(source, target))
    assert source.given_up


async def test_a_receiver_that_is_out_of_reach_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "AGAIN_AFTER", 0.01)
    source, target = Script(ended(Outcome())), Script(running())
    target.reachable = False
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await first_word(*ends(source, target))


async def test_where_there_is_no_way_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "END_TIME", 0.01)
    source, target = Script(ended(Unreachable("no way"))), Script(running())
    async with asyncio.timeout(1):
        await last_words(*ends(source, target))
    assert target.given_up and not source.given_up
    with pytest.raises(Unreachable):
        raise_cause([source.ending, target.ending])
