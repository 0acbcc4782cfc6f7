"""Commands through loss, delay, reconnection and refusal, on a clock and a wire that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common.clock import ManualClock
from common.codec import decode_from_controller, encode
from common.commands import StartContainer, UpdateContainer
from common.errors import Conflict, DeadlinePassed, DriverFailed, Internal, InvalidRequest, Stale, Unavailable
from common.messages import (
    Accepted,
    AgentMessage,
    Command,
    Confirm,
    ControllerMessage,
    Heartbeat,
    Inventory,
    Outcome,
    Ping,
    Progress,
    Refused,
    Result,
    ResultAcknowledged,
    Samples,
    StateChanged,
    Welcome,
)
from common.reports import ContainerReport, ContainerSpec, NodeSample, WireError
from common.states import NodeStatus
from controller.dispatch.dispatcher import Dispatcher
from controller.dispatch.listener import Receive
from controller.dispatch.sessions import LinkSettings
from tests.helpers.fake_agent import FACTS, hello
from tests.helpers.recording_listener import RecordingListener

T = TypeVar("T")
SETTINGS = LinkSettings()
KEY = "k" * 40
ID = "op/1/do"
DONE = Result(ID, outcome=Outcome(bytes=7))
INVENTORY = Inventory(FACTS, (), ())
CHANGE = StateChanged(ContainerReport("101", 1, 102))
SAMPLES = Samples(1.0, NodeSample(1, 1, 0.5, (0.0, 0.0, 0.0), 9.0), ())


class Wire:
    """A transport that keeps what is sent; `full` makes it refuse."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, ControllerMessage]] = []
        self.allowed: set[str] = set()
        self.full = False
        self.late: list[AgentMessage] = []
        self.receive: Receive | None = None

    def start(self, receive: Receive) -> None:
        self.receive = receive

    def allow(self, key: str) -> None:
        self.allowed.add(key)

    def deny(self, key: str) -> None:
        self.allowed.discard(key)

    def send(self, connection: bytes, payload: bytes) -> bool:
        if not self.full:
            self.sent.append((connection, decode_from_controller(payload)))
        return not self.full

    def drain(self, limit: int) -> None:
        assert self.receive is not None
        for message in self.late[:limit]:
            self.receive(b"1", KEY, encode(message))
        del self.late[:limit]

    def close(self) -> None:
        self.receive = None


class World:
    """A dispatcher with one node, whose agent is the test."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.wire = Wire()
        self.listener = RecordingListener()
        self.over: set[str] = set()
        self.dispatcher = Dispatcher(
            router=self.wire,
            clock=self.clock,
            epoch=7,
            settings=SETTINGS,
            listener=self.listener,
            over=lambda command: command in self.over,
        )
        self.wire.start(self.dispatcher._inbox.receive)
        self.dispatcher.enrol("node1", KEY)
        self.connections = 0

    def say(self, message: AgentMessage, connection: bytes = b"1", key: str = KEY) -> None:
        assert self.wire.receive is not None
        self.wire.receive(connection, key, encode(message))

    def join(self, connection: bytes = b"1") -> Welcome:
        self.connections += 1
        self.say(hello(connection=self.connections, monotonic=self.agent_clock()), connection)
        welcome = self.take(Welcome)[-1]
        self.say(INVENTORY, connection)
        return welcome

    def agent_clock(self) -> float:
        return self.clock.monotonic() + 5000

    def take(self, kind: type[T]) -> list[T]:
        """What was sent of this kind since it was last asked; the rest stays."""
        found = [message for _, message in self.wire.sent if isinstance(message, kind)]
        self.wire.sent = [(to, message) for to, message in self.wire.sent if not isinstance(message, kind)]
        return found

    def call(self, command: str = ID, seconds: float = 100.0, **more: object) -> Awaitable[Result]:
        options: dict[str, object] = {"generation": 3, "deadline": self.clock.monotonic() + seconds, **more}
        return self.dispatcher.call("node1", StartContainer("101"), command=command, **options)  # type: ignore[arg-type]

    async def begin(self, **more: object) -> asyncio.Future[Result]:
        waiting = asyncio.ensure_future(self.call(**more))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return waiting

    def passes(self, seconds: float, connection: bytes = b"1") -> None:
        """Time, in ticks; the agent lives."""
        for sequence in range(round(seconds / SETTINGS.tick)):
            self.clock.advance(SETTINGS.tick)
            self.say(Heartbeat(round(self.clock.monotonic() * 100) + sequence, self.agent_clock(), 0.0), connection)
            self.dispatcher.tick()


@pytest.fixture
def world() -> World:
    return World()


async def test_a_command_carries_its_fences_and_a_short_life_on_the_agents_clock(world: World) -> None:
    welcome = world.join()
    waiting = await world.begin(request="request1")
    [command] = world.take(Command)
    assert (command.id, command.epoch, command.session, command.generation) == (ID, 7, welcome.session, 3)
    assert command.expires_at == world.agent_clock() + SETTINGS.begin_within
    assert (command.arguments, command.request) == (StartContainer("101"), "request1")
    world.say(DONE)
    assert await waiting == DONE


async def test_a_command_never_outlives_its_deadline(world: World) -> None:
    world.join()
    waiting = await world.begin(seconds=4.0)
    assert world.take(Command)[0].expires_at == world.agent_clock() + 4.0
    waiting.cancel()


async def test_nothing_is_sent_before_the_inventory_is_processed(world: World) -> None:
    world.listener.gate = asyncio.Event()
    world.listener.generations = {"101": 3}
    waiting = await world.begin()
    world.join()
    world.say(CHANGE)
    world.passes(3)
    assert world.take(Command) == [] and world.take(Confirm) == []
    assert world.dispatcher.status("node1")[0] is NodeStatus.OFFLINE
    world.listener.gate.set()
    await asyncio.sleep(0.01)
    assert [type(message) for _, message in world.wire.sent if not isinstance(message, Ping)] == [Confirm, Command]
    assert [what for what, _, _ in world.listener.heard] == ["hello", "inventory", "status", "state_changed"]
    world.say(DONE)
    await waiting


async def test_reports_before_the_inventory_say_nothing(world: World) -> None:
    world.say(hello())
    world.say(CHANGE)
    world.say(SAMPLES)
    assert [what for what, _, _ in world.listener.heard] == ["hello"]
    world.say(INVENTORY)
    world.say(SAMPLES)
    assert [what for what, _, _ in world.listener.heard][1:] == ["inventory", "status", "samples"]


@pytest.mark.parametrize("later", [False, True])
async def test_an_inventory_that_cannot_be_processed_ends_the_session(world: World, later: bool) -> None:
    world.listener.failure = OSError("disk")
    world.listener.gate = asyncio.Event() if later else None
    if world.listener.gate is not None:
        world.listener.gate.set()
        world.listener.inventory = lambda node, inventory: world.listener._later(world.listener.gate)  # type: ignore
    world.join()
    await asyncio.sleep(0.01)
    assert world.take(Refused)[0].code == "unavailable"
    assert world.dispatcher.status("node1")[0] is NodeStatus.OFFLINE
    world.listener.failure = None
    world.join()
    await asyncio.sleep(0.01)
    assert world.dispatcher.status("node1")[0] is NodeStatus.ONLINE


async def test_sent_again_until_accepted_and_then_no_more(world: World) -> None:
    world.join()
    waiting = await world.begin()
    world.passes(1.5)
    assert len(world.take(Command)) == 1
    world.passes(0.5)
    [again] = world.take(Command)
    assert again.expires_at == world.agent_clock() + SETTINGS.begin_within
    world.say(Accepted(ID))
    world.passes(20)
    assert world.take(Command) == []
    world.say(DONE)
    await waiting


async def test_sent_again_in_every_new_session_even_when_accepted(world: World) -> None:
    world.join()
    waiting = await world.begin()
    world.say(Accepted(ID))
    world.take(Command)
    welcome = world.join(b"2")
    [again] = world.take(Command)
    assert again.session == welcome.session
    world.passes(2, b"2")
    assert len(world.take(Command)) == 1
    world.say(DONE, b"1")
    await asyncio.sleep(0)
    assert not waiting.done(), "an older connection counts no more"
    world.say(DONE, b"2")
    assert await waiting == DONE


@pytest.mark.parametrize("field", ["session", "expires_at", None])
async def test_stale_for_a_late_message_is_not_the_end(world: World, field: str | None) -> None:
    world.join()
    waiting = await world.begin()
    world.say(Accepted(ID))
    world.say(Result(ID, error=WireError("stale", "too late", field)))
    world.take(Command)
    world.passes(2)
    assert len(world.take(Command)) == 1
    world.say(DONE)
    assert await waiting == DONE


@pytest.mark.parametrize("field", ["epoch", "generation"])
async def test_stale_for_an_older_epoch_or_generation_is(world: World, field: str) -> None:
    world.join()
    waiting = await world.begin()
    world.say(Result(ID, error=WireError("stale", "older", field)))
    with pytest.raises(Stale):
        await waiting


async def test_the_agents_error_is_raised_as_it_was(world: World) -> None:
    world.join()
    waiting = await world.begin()
    world.say(Result(ID, error=WireError("driver-failed", "lxc-start: no", "x", "y")))
    with pytest.raises(DriverFailed) as caught:
        await waiting
    assert (caught.value.text, caught.value.field, caught.value.allowed) == ("lxc-start: no", "x", "y")


@pytest.mark.parametrize("wrong", [Result(ID), Result(ID, outcome=Outcome(), error=WireError("internal", "x"))])
async def test_a_result_that_says_nothing_or_two_things_is_a_fault(world: World, wrong: Result) -> None:
    world.join()
    waiting = await world.begin()
    world.say(wrong)
    with pytest.raises(Internal):
        await waiting


async def test_a_call_waits_for_its_node_until_the_deadline(world: World) -> None:
    waiting = await world.begin(seconds=30.0)
    world.passes(29)
    assert not waiting.done()
    world.passes(1)
    with pytest.raises(DeadlinePassed):
        await waiting
    with pytest.raises(DeadlinePassed):
        await world.call(seconds=0)


async def test_removal_ends_calls_and_silences_the_agent(world: World) -> None:
    world.join()
    waiting = await world.begin()
    world.wire.sent.clear()
    world.dispatcher.remove("node1")
    world.say(DONE)
    world.say(hello(connection=9))
    world.passes(5)
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await world.call()
    assert world.wire.sent == [] and world.wire.allowed == set()


async def test_removal_while_an_inventory_is_processed_tells_nothing_more(world: World) -> None:
    world.listener.gate = asyncio.Event()
    world.join()
    world.say(CHANGE)
    world.dispatcher.remove("node1")
    world.listener.gate.set()
    await asyncio.sleep(0.01)
    assert [what for what, _, _ in world.listener.heard] == ["hello", "inventory"]
    assert world.take(Confirm) == []


async def test_cancelling_forgets_the_call_and_the_id_may_be_called_again(world: World) -> None:
    world.join()
    waiting = await world.begin()
    with pytest.raises(RuntimeError):
        await world.call()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    world.say(DONE)
    assert world.dispatcher.drops.counts["result nobody waits for"] == 1
    again = await world.begin()
    world.say(DONE)
    assert await again == DONE


async def test_acknowledged_once_the_agent_is_there_and_again_when_it_repeats(world: World) -> None:
    world.dispatcher.acknowledge("node1", ["a", "b"])
    world.join()
    world.passes(1)
    assert world.take(ResultAcknowledged) == [ResultAcknowledged(("a", "b"))]
    world.say(Result("a", outcome=Outcome()))
    assert world.take(ResultAcknowledged) == [ResultAcknowledged(("a",))]
    world.say(Result("unknown", outcome=Outcome()))
    world.wire.full = True
    world.dispatcher.acknowledge("node1", [f"c{number}" for number in range(2500)])
    world.wire.full = False
    world.passes(0.5)
    assert [len(message.commands) for message in world.take(ResultAcknowledged)] == [1000, 1000, 500]


async def test_the_result_of_an_operation_that_is_over_is_acknowledged(world: World) -> None:
    """The acknowledgement was lost with the controller's earlier life: without it the agent repeats it for ever."""
    world.over = {"ended/1/do"}
    world.join()
    for command in ("ended/1/do", "runs/1/do"):
        world.say(Result(command, outcome=Outcome()))
    world.passes(1)
    assert world.take(ResultAcknowledged) == [ResultAcknowledged(("ended/1/do",))]
    assert world.dispatcher.drops.counts["result nobody waits for"] == 1
    world.over.add("runs/1/do")
    world.passes(2)
    assert world.take(ResultAcknowledged) == [ResultAcknowledged(("runs/1/do",))]


async def test_a_full_queue_delays_a_command(world: World) -> None:
    world.join()
    world.wire.full = True
    waiting = await world.begin()
    world.wire.full = False
    world.passes(2)
    assert len(world.take(Command)) == 1
    world.say(DONE)
    await waiting


async def test_progress_is_told_and_its_failure_harms_nothing(world: World) -> None:
    world.join()
    seen: list[int | None] = []

    def note(progress: Progress) -> None:
        seen.append(progress.percent)
        raise OSError("nobody looks")

    waiting = await world.begin(progress=note)
    world.say(Progress(ID, "unpack", 10))
    world.say(Progress(ID, "unpack", 20))
    world.say(Progress("other", "unpack", 30))
    world.say(DONE)
    await waiting
    assert seen == [10, 20] and world.dispatcher.drops.counts["failed"] == 2


async def test_another_node_cannot_answer(world: World) -> None:
    world.join()
    waiting = await world.begin()
    other = "o" * 40
    world.dispatcher.enrol("node2", other)
    world.say(hello(), b"2", other)
    world.say(INVENTORY, b"2", other)
    world.say(DONE, b"2", other)
    world.say(DONE, b"3", "x" * 40)
    await asyncio.sleep(0)
    assert not waiting.done()
    world.say(DONE)
    await waiting


async def test_what_no_agent_would_accept_is_refused_at_once(world: World) -> None:
    spec = ContainerSpec("101", 1, "x" * 5000, "aa", {})
    with pytest.raises(InvalidRequest):
        await world.dispatcher.call(
            "node1", UpdateContainer(spec), command=ID, generation=1, deadline=world.clock.monotonic() + 9
        )
    with pytest.raises(InvalidRequest):
        await world.call(command="x" * 129)


async def test_an_agent_without_a_session_is_told_now_and_then_to_say_hello(world: World) -> None:
    for _ in range(50):
        world.say(Heartbeat(1, 1.0, 0.0))
    assert [refused.code for refused in world.take(Refused)] == ["stale"]
    world.clock.advance(SETTINGS.heartbeat_interval)
    world.say(Heartbeat(1, 1.0, 0.0))
    assert len(world.take(Refused)) == 1


async def test_what_arrived_meanwhile_is_heard_before_anyone_is_judged(world: World) -> None:
    world.join()
    for sequence in range(40):
        world.clock.advance(SETTINGS.tick)
        world.wire.late.append(Heartbeat(sequence, world.agent_clock(), 0.0))
        world.dispatcher.tick()
    assert world.listener.of("status", "node1") == ["Online"]


async def test_time_in_which_the_controller_stood_still_counts_against_nobody(world: World) -> None:
    world.join()
    world.passes(1)
    world.clock.advance(3600)
    world.dispatcher.tick()
    assert world.listener.of("status", "node1") == ["Online"]
    for _ in range(20):
        world.clock.advance(SETTINGS.tick)
        world.dispatcher.tick()
    assert world.listener.of("status", "node1") == ["Online", "Suspect", "Offline"]


async def test_what_an_older_session_said_is_not_told_after_its_inventory(world: World) -> None:
    world.join()
    world.listener.gate = asyncio.Event()
    world.say(INVENTORY)
    world.say(CHANGE)
    world.join(b"2")
    world.listener.gate.set()
    await asyncio.sleep(0.01)
    assert world.listener.of("state_changed", "node1") == []
    assert len(world.listener.of("inventory", "node1")) == 3
    world.say(CHANGE, b"2")
    assert world.listener.of("state_changed", "node1") == [CHANGE]


async def test_one_broken_listener_call_does_not_stop_the_tick(world: World) -> None:
    other = "o" * 40
    world.dispatcher.enrol("node2", other)
    world.join()
    world.say(hello(), b"2", other)
    world.say(INVENTORY, b"2", other)
    calls: list[str] = []

    def node_status(node: str, status: NodeStatus, reason: str) -> None:
        calls.append(node)
        raise OSError("full")

    world.listener.node_status = node_status  # type: ignore[method-assign]
    for _ in range(20):
        world.clock.advance(SETTINGS.tick)
        world.dispatcher.tick()
    assert calls == ["node1", "node2"] * 2


async def test_pings_come_each_interval(world: World) -> None:
    world.join()
    world.take(Ping)
    world.passes(15)
    pings = world.take(Ping)
    assert len(pings) == 10
    assert [ping.sequence for ping in pings] == sorted({ping.sequence for ping in pings})


async def test_a_node_that_joins_anew_has_a_new_key_and_keeps_its_calls(world: World) -> None:
    world.join()
    waiting = await world.begin()
    world.dispatcher.enrol("node1", "n" * 40)
    assert world.wire.allowed == {"n" * 40}
    with pytest.raises(Conflict):
        world.dispatcher.enrol("node2", "n" * 40)
    world.say(DONE)
    world.say(hello(), b"2", "n" * 40)
    world.say(INVENTORY, b"2", "n" * 40)
    world.say(DONE, b"2", "n" * 40)
    assert await waiting == DONE
    assert world.dispatcher.drops.counts["key of no node"] == 1


@hypothesis_settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.sampled_from(["lost", "kept", "twice", "reconnect", "stale", "tick", "die"]), max_size=30))
def test_whatever_the_wire_does_the_command_is_answered_in_the_end(faults: list[str]) -> None:
    asyncio.run(_ends_after(faults))


async def _ends_after(faults: list[str]) -> None:
    """A faulty wire and then a good one: the one result comes, and the agent began the command once."""
    agent = FaultyAgent(World())
    waiting = await agent.world.begin(seconds=10_000)
    for fault in faults:
        getattr(agent, fault)()
        agent.world.passes(0.5, agent.connection)
    assert not waiting.done()
    agent.reconnect()
    agent.kept()
    assert agent.begun == [ID]
    agent.world.say(DONE, agent.connection)
    assert await waiting == DONE


class FaultyAgent:
    """An agent of a `World` that accepts commands of its current session; its methods are what can go wrong."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.begun: list[str] = []
        self.connection = b"c0"
        self.session = world.join(self.connection).session

    def reconnect(self) -> None:
        self.connection = b"c%d" % (self.world.connections + 1)
        self.session = self.world.join(self.connection).session

    def die(self) -> None:
        for _ in range(40):
            self.world.clock.advance(SETTINGS.tick)
            self.world.dispatcher.tick()
        assert self.world.dispatcher.status("node1")[0] is NodeStatus.OFFLINE
        self.reconnect()

    def lost(self) -> None:
        self.world.take(Command)

    def stale(self) -> None:
        self.world.say(Result(ID, error=WireError("stale", "expired", "expires_at")), self.connection)

    def tick(self) -> None:
        self.world.dispatcher.tick()

    def twice(self) -> None:
        self.kept(times=2)

    def kept(self, times: int = 1) -> None:
        for command in self.world.take(Command) * times:
            if command.session != self.session:
                self.world.say(Result(ID, error=WireError("stale", "older session", "session")), self.connection)
                continue
            if not self.begun:
                self.begun.append(command.id)
            self.world.say(Accepted(ID), self.connection)
