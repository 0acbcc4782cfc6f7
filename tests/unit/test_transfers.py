"""Which of two failures of a transfer is told: the cause, not the broken connection that it led to."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import DriverFailed, Unauthorized, Unavailable
from common.messages import Outcome
from controller.operations.transfers import first_word, raise_cause


def ended(result: Outcome | Exception) -> asyncio.Future[Outcome]:
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future


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


async def test_a_sender_that_is_at_it_again_is_not_waited_for() -> None:
    silent: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(5):
        await first_word(silent, ended(Outcome()))
        await first_word(ended(DriverFailed("the disk")), silent)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await first_word(ended(Outcome()), silent)
