"""The operations' state machine: any sequence of successes, failures, cancels and failing undos has exactly one end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import Cancelled, DriverFailed
from common.states import Status, may_follow
from controller.operations import machine
from controller.operations.machine import Act, Decision, Shape, State

SHAPES = st.lists(st.booleans(), min_size=1, max_size=6).flatmap(
    lambda undoable: st.integers(0, len(undoable)).map(
        lambda end: Shape(tuple(undo and i < end for i, undo in enumerate(undoable)), end)
    )
)


class Operation(RuleBasedStateMachine):
    """Drives one operation as the engine does, and keeps what was done and undone, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = Shape((True, False, True), 3)
        self.state = State()
        self.begun: list[int] = []
        self.undone: list[int] = []
        self.undo_failed = False

    @initialize(shape=SHAPES)
    def choose_shape(self, shape: Shape) -> None:
        self.shape = shape

    def become(self, state: State) -> None:
        before, self.state = self.state, state
        assert before.status is state.status or may_follow(before.status, state.status)
        assert before.undoing <= state.undoing, "an operation on its way back never goes on"

    def acts(self, act: Act) -> bool:
        return machine.decide(self.shape, self.state).act is act

    @precondition(lambda self: self.acts(Act.DO))
    @rule()
    def step_is_done(self) -> None:
        self.begun.append(machine.decide(self.shape, self.state).step)
        self.become(machine.done(self.state))

    @precondition(lambda self: self.acts(Act.DO))
    @rule()
    def step_fails(self) -> None:
        self.begun.append(machine.decide(self.shape, self.state).step)
        self.become(machine.failed(self.state, DriverFailed("it broke")))

    @precondition(lambda self: self.acts(Act.DO) and machine.may_cancel(self.shape, self.state))
    @rule()
    def step_is_cancelled(self) -> None:
        self.begun.append(machine.decide(self.shape, self.state).step)
        self.become(machine.failed(self.state, Cancelled("on request")))

    @precondition(lambda self: self.acts(Act.UNDO))
    @rule()
    def step_is_undone(self) -> None:
        step = machine.decide(self.shape, self.state).step
        self.undone.append(step)
        self.become(machine.undone(self.state, step))

    @precondition(lambda self: self.acts(Act.UNDO))
    @rule()
    def undo_fails(self) -> None:
        self.undo_failed = True
        self.become(machine.undo_failed(self.state, DriverFailed("it would not go back")))
        assert self.acts(Act.END), "what may still hold is not undone beneath"

    @precondition(lambda self: self.acts(Act.END))
    @rule()
    def nothing_follows_the_end(self) -> None:
        assert self.begun, "an operation does not end before it has begun"
        assert not machine.may_cancel(self.shape, self.state)

    @invariant()
    def steps_go_in_order(self) -> None:
        assert self.begun == list(range(len(self.begun)))
        assert self.undone == sorted(set(self.undone), reverse=True)
        assert set(self.undone) <= set(self.begun)

    @invariant()
    def what_cannot_be_taken_back_is_not(self) -> None:
        assert all(self.shape.undoable[step] and step < self.shape.no_return for step in self.undone)
        if self.begun and self.begun[-1] >= self.shape.no_return:
            assert not self.undone and not machine.may_cancel(self.shape, self.state)

    @invariant()
    def the_end_is_one_and_says_what_happened(self) -> None:
        if not self.acts(Act.END):
            return
        end = machine.final_status(self.state)
        assert end.final and may_follow(self.state.status, end)
        assert (end is Status.SUCCESS) == (self.begun == list(range(self.shape.steps)) and not self.state.undoing)
        assert (end is Status.SUCCESS) == (self.state.error is None)
        assert not (self.undo_failed and end is not Status.FAILURE)
        if end is not Status.SUCCESS and not self.undo_failed and self.begun[-1] < self.shape.no_return:
            assert self.undone == [step for step in reversed(self.begun) if self.shape.undoable[step]]


TestOperation = Operation.TestCase
TestOperation.settings = settings(max_examples=300, stateful_step_count=20)


@given(SHAPES, st.integers(0, 6), st.lists(st.booleans(), max_size=6))
def test_it_always_ends_and_undoes_in_order(shape: Shape, fails: int, undos: list[bool]) -> None:
    state, undone, failing = State(), [], iter(undos)
    for _ in range(2 * shape.steps + 1):
        decision = machine.decide(shape, state)
        if decision.act is Act.END:
            break
        if decision.act is Act.DO:
            state = machine.failed(state, DriverFailed("no")) if decision.step == fails else machine.done(state)
        elif next(failing, True):
            undone.append(decision.step)
            state = machine.undone(state, decision.step)
        else:
            state = machine.undo_failed(state, DriverFailed("no"))
    assert machine.decide(shape, state).act is Act.END and not machine.may_cancel(shape, state)
    due = [step for step in range(fails, -1, -1) if shape.undoable[step]] if fails < shape.no_return else []
    assert undone == due if all(undos) else undone == due[: len(undone)]


def test_the_first_reason_and_its_step_are_kept() -> None:
    state = machine.failed(machine.done(State()), DriverFailed("the disk broke"))
    assert state.error is not None and (state.error.code, state.error.step) == ("driver-failed", 1)
    state = machine.undo_failed(state, DriverFailed("the node is gone"))
    assert state.error is not None
    assert state.error.text == "the disk broke; and it could not be undone: the node is gone"


def test_what_an_earlier_life_may_have_begun_is_undone() -> None:
    shape = Shape((False, False, True, False), 3)
    cancelled = machine.from_the_furthest(shape, machine.failed(State(), Cancelled("on request")))
    assert machine.decide(shape, cancelled) == Decision(Act.UNDO, 2)
    assert cancelled.error is not None and cancelled.error.step == 0
    behind = State(position=3)
    assert machine.from_the_furthest(shape, behind) == behind
