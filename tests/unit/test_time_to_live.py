"""A command's time to live: from the controller's clock to the agent's, through a network that delays as it likes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.admission import Fences, Refuse, Run, decide
from common.commands import StartContainer
from controller.dispatch.calls import Call
from controller.dispatch.sessions import LinkSettings, Session
from tests.helpers.fake_agent import hello

PROFILE = settings(max_examples=500, deadline=None, database=None)
SETTINGS = LinkSettings()
DELAYS = st.floats(0, 30)
ADJUSTED = 5e-4
"""By how much a monotonic clock may be too fast or slow while it is adjusted (adjtimex(2): 500 parts in a million)."""


@PROFILE
@given(
    ahead=st.floats(-1e6, 1e6),
    rate=st.floats(1 - ADJUSTED, 1 + ADJUSTED),
    hello_took=DELAYS,
    beats=st.lists(st.tuples(st.floats(0, 5), DELAYS), max_size=5),
    waited=st.floats(0, 5),
    time_left=st.floats(0.1, 1000),
    took=DELAYS,
)
def test_no_command_begins_later_than_it_may(
    ahead: float,
    rate: float,
    hello_took: float,
    beats: list[tuple[float, float]],
    waited: float,
    time_left: float,
    took: float,
) -> None:
    def agents(moment: float) -> float:
        return ahead + rate * moment

    now = 1000.0 + hello_took
    session = Session("s", b"c", hello(), heard=now, offset=agents(1000.0) - now)
    for number, (pause, delay) in enumerate(beats):
        now += pause
        session.heartbeat(number, agents(now - delay), now)
    now += waited
    call = Call("op/1/do", StartContainer("101"), 1, now + time_left, "", lambda _: None)
    command = call.message(session, 7, SETTINGS, now)
    allowed = min(SETTINGS.begin_within, time_left)
    decision = decide(command, None, Fences("s", 7, {}), agents(now + took))
    slack = 0.1
    if took > allowed + slack:
        assert isinstance(decision, Refuse), "it began after its time"
    newest = beats[-1][1] if beats else hello_took
    if took < allowed - newest - slack:
        assert isinstance(decision, Run), "it was refused in its time"
