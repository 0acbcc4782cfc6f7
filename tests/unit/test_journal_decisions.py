"""Whether a command may run: the decision alone, over all that can be."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.admission import Answer, Fences, Record, Refuse, Run, decide
from common.commands import StartContainer
from common.messages import Command, Outcome, Result

PROFILE = settings(max_examples=500, deadline=None, database=None)
RESULT = Result("op/1/do", outcome=Outcome())
SMALL = st.integers(0, 3)
COMMANDS = st.builds(
    Command,
    id=st.just("op/1/do"),
    epoch=SMALL,
    session=st.sampled_from(["now", "before", ""]),
    generation=SMALL,
    expires_at=st.floats(0, 20) | st.just(float("nan")),
    arguments=st.just(StartContainer("101")),
)
RECORDS = st.none() | st.just(Record("op/1/do", None)) | st.just(Record("op/1/do", RESULT))
FENCES = st.builds(
    Fences, session=st.sampled_from(["now", ""]), epoch=SMALL, highest=st.fixed_dictionaries({"101": SMALL})
)
NOW = st.floats(0, 20)


@PROFILE
@given(COMMANDS, RECORDS, FENCES, NOW)
def test_a_finished_command_is_answered_whatever_else_is_true(
    command: Command, record: Record | None, fences: Fences, now: float
) -> None:
    finished = record is not None and record.result is not None
    decision = decide(command, record, fences, now)
    assert isinstance(decision, Answer) == finished
    if isinstance(decision, Answer):
        assert decision.result is RESULT


@PROFILE
@given(COMMANDS, RECORDS, FENCES, NOW)
def test_nothing_stale_ever_runs_and_nothing_else_is_refused(
    command: Command, record: Record | None, fences: Fences, now: float
) -> None:
    decision = decide(command, record, fences, now)
    current = (
        command.session == fences.session
        and command.epoch >= fences.epoch
        and command.generation >= fences.highest["101"]
        and command.expires_at > now
    )
    if isinstance(decision, Run):
        assert current
        assert decision.again == (record is not None)
    if isinstance(decision, Refuse):
        assert not current
        assert decision.error.code == "stale"
