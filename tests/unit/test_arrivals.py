"""Messages of a session: whatever a network does to them, they are handled in their order, and each once."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Accepted, FromAgent
from controller.dispatch.arrivals import MOST, PATIENCE, Arrivals

PROFILE = settings(max_examples=300, deadline=None, database=None)


def said(number: int) -> Accepted:
    return Accepted(f"op/{number}", session="s", number=number)


def numbers(messages: list[FromAgent]) -> list[int]:
    return [message.number for message in messages]


@PROFILE
@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 2**32))
def test_duplicated_and_shuffled_they_come_out_once_and_in_order(count: int, copies: int, seed: int) -> None:
    flying = [said(number) for number in range(1, count + 1)] * copies
    random.Random(seed).shuffle(flying)
    arrivals = Arrivals()
    out = [number for message in flying for number in numbers(arrivals.take(message, 0.0))]
    assert out == list(range(1, count + 1))


@PROFILE
@given(st.sets(st.integers(1, 30)), st.integers(0, 2**32))
def test_what_never_comes_is_passed_over_in_time(lost: set[int], seed: int) -> None:
    flying = [said(number) for number in range(1, 31) if number not in lost]
    random.Random(seed).shuffle(flying)
    arrivals = Arrivals()
    out = [number for message in flying for number in numbers(arrivals.take(message, 0.0))]
    assert arrivals.overdue(PATIENCE - 0.01) == []
    now = PATIENCE
    while more := arrivals.overdue(now):
        out += numbers(more)
        now += PATIENCE
    assert out == [number for number in range(1, 31) if number not in lost]


def test_a_message_that_was_passed_over_comes_too_late() -> None:
    arrivals = Arrivals()
    assert arrivals.take(said(2), 0) == []
    assert numbers(arrivals.overdue(PATIENCE)) == [2]
    assert arrivals.take(said(1), PATIENCE) == []
    assert numbers(arrivals.take(said(3), PATIENCE)) == [3]


def test_the_wait_begins_anew_with_each_gap() -> None:
    arrivals = Arrivals()
    assert arrivals.take(said(2), 0) == []
    assert arrivals.take(said(4), 1) == []
    assert numbers(arrivals.take(said(1), 1.9)) == [1, 2]
    assert arrivals.overdue(1.9 + PATIENCE - 0.01) == []
    assert numbers(arrivals.overdue(1.9 + PATIENCE)) == [4]


def test_only_so_many_are_held() -> None:
    arrivals = Arrivals()
    out = [number for sent in range(2, MOST + 3) for number in numbers(arrivals.take(said(sent), 0))]
    assert out == list(range(2, MOST + 3))


def test_agents_that_do_not_number_are_heard() -> None:
    arrivals = Arrivals()
    message = Accepted("op")
    assert [arrivals.take(message, 0), arrivals.take(message, 0)] == [[message], [message]]
