"""The agent's link against a double of the controller, over real sockets with CURVE and ZAP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgpack
import pytest

from agent.identity import Identity
from agent.link import Backoff, Link
from common import keys
from common.clock import SystemClock
from common.commands import StartContainer
from common.messages import (
    Abandon,
    Accepted,
    Command,
    Confirm,
    FromAgent,
    Heartbeat,
    Hello,
    Inventory,
    Refused,
    Result,
    ResultAcknowledged,
    Samples,
    StateChanged,
    Welcome,
)
from common.reports import ContainerReport, NodeFacts, NodeSample
from tests.helpers.fake_controller import FakeController

FACTS = NodeFacts("h", "x86_64", 2, 2**30, 2**30, "fake", "1", "dir", "6.1", "v1", "0.1.0")
NODE_SAMPLE = NodeSample(1, 1, None, (0.0, 0.0, 0.0), 1.0)
PAIR = keys.generate()


@dataclass
class Recorder:
    """Notes what the link says, and tells an inventory, which can be made to wait."""

    calls: list[object] = field(default_factory=list)
    taking: asyncio.Event = field(default_factory=asyncio.Event)
    proceed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.proceed.set()
        self.changed = asyncio.Event()

    def note(self, call: object) -> None:
        self.calls.append(call)
        self.changed.set()

    async def until(self, kind: type) -> object:
        async with asyncio.timeout(10):
            while True:
                for call in self.calls:
                    if isinstance(call, kind):
                        return call
                self.changed.clear()
                await self.changed.wait()

    async def welcomed(self, welcome: Welcome) -> None:
        self.note(welcome)

    async def inventory(self) -> Inventory:
        self.taking.set()
        await self.proceed.wait()
        return Inventory(FACTS, (), ())

    def lost(self) -> None:
        self.note("lost")

    def command(self, command: Command) -> None:
        self.note(command)

    def acknowledged(self, commands: tuple[str, ...]) -> None:
        self.note(commands)

    def abandoned(self, command: str) -> None:
        self.note(("abandoned", command))

    def confirmed(self, generations: dict[str, int]) -> None:
        self.note(generations)


@asynccontextmanager
async def running_link(controller: FakeController, recorder: Recorder) -> AsyncIterator[Link]:
    identity = Identity("boot", "machine", "instance")
    backoff = Backoff(first=0.02, longest=0.1)
    link = Link(controller.address, PAIR, controller.keys.public, identity, SystemClock(), recorder, backoff)
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled(), "the link must run until it is cancelled"


async def test_a_session_is_hello_welcome_inventory_and_then_messages_both_ways() -> None:
    recorder = Recorder()
    async with FakeController(PAIR.public) as controller, running_link(controller, recorder) as link:
        hello = await controller.expect(Hello)
        assert (hello.boot_id, hello.machine_id, hello.instance, hello.connection) == ("boot", "machine", "instance", 1)
        await controller.expect(Inventory)
        assert link.connected.is_set()
        command = await controller.command("op/1/do", StartContainer("101"))
        await controller.send(ResultAcknowledged(("op/0/do",)))
        await controller.send(Confirm({"101": 3}))
        assert await recorder.until(Command) == command
        assert await recorder.until(tuple) == ("op/0/do",)
        assert await recorder.until(dict) == {"101": 3}
        recorder.calls.clear()
        await controller.send(Abandon("op/1/do"))
        assert await recorder.until(tuple) == ("abandoned", "op/1/do")
        link.send(Accepted("op/1/do"))
        assert (await controller.expect(Accepted)).command == "op/1/do"
        assert set(controller.users) == {PAIR.public}


async def test_what_is_said_in_a_session_bears_its_name_and_is_numbered() -> None:
    async with FakeController(PAIR.public) as controller, running_link(controller, Recorder()) as link:
        await controller.expect_ready()
        for number in range(5):
            link.send(Accepted(f"op/{number}/do"))
        while (await controller.expect(Accepted)).command != "op/4/do":
            pass
        said = [message for message in controller.seen if isinstance(message, FromAgent)]
        assert {message.session for message in said} == {controller.session}
        assert [message.number for message in said] == list(range(1, len(said) + 1))


async def test_a_welcome_of_an_earlier_connection_is_not_believed() -> None:
    recorder = Recorder()
    async with FakeController(PAIR.public) as controller:
        controller.welcome_at_once = False
        async with running_link(controller, recorder):
            await controller.expect(Hello)
            controller.session = "earlier"
            await controller.welcome(connection=99)
            controller.session = "session-1"
            await controller.welcome(connection=1)
            await controller.expect(Inventory)
            assert (await recorder.until(Welcome)).session == "session-1"


async def test_heartbeats_count_up_and_tell_the_clock() -> None:
    async with FakeController(PAIR.public) as controller, running_link(controller, Recorder()):
        await controller.expect_ready()
        first, second = await controller.expect(Heartbeat), await controller.expect(Heartbeat)
        assert second.sequence == first.sequence + 1
        assert 0.1 < second.monotonic - first.monotonic < 2


async def test_an_unknown_key_is_let_in_once_it_is_enrolled() -> None:
    async with FakeController() as controller, running_link(controller, Recorder()) as link:
        await controller.denied.get()
        await controller.denied.get()  # it comes again by itself
        assert not link.connected.is_set()
        assert controller.seen == []
        controller.allowed.add(PAIR.public)
        await controller.expect_ready()


async def test_a_refusal_is_tried_again() -> None:
    async with FakeController(PAIR.public) as controller:
        controller.welcome_at_once = False
        async with running_link(controller, Recorder()) as link:
            assert (await controller.expect(Hello)).connection == 1
            await controller.send(Refused("duplicate", "another agent with this key"))
            assert (await controller.expect(Hello)).connection == 2
            assert not link.connected.is_set()
            await controller.welcome()
            await controller.expect(Inventory)


async def test_a_silent_controller_ends_the_session_and_a_new_one_begins() -> None:
    recorder = Recorder()
    async with FakeController(PAIR.public) as controller:
        controller.heartbeat_timeout = 0.5
        async with running_link(controller, recorder):
            await controller.expect_ready()
            controller.ping = False
            assert (await controller.expect(Hello)).connection == 2
            assert "lost" in recorder.calls


async def test_a_restarted_controller_gets_hello_and_inventory_again() -> None:
    recorder = Recorder()
    async with FakeController(PAIR.public) as controller, running_link(controller, recorder):
        await controller.expect_ready()
        await controller.close()
        async with FakeController(PAIR.public, port=controller.port, pair=controller.keys) as second:
            assert (await second.expect(Hello)).connection >= 2
            await second.expect(Inventory)
            assert "lost" in recorder.calls


async def test_replies_wait_until_the_inventory_is_told() -> None:
    recorder = Recorder()
    recorder.proceed.clear()
    async with FakeController(PAIR.public) as controller, running_link(controller, recorder) as link:
        await recorder.taking.wait()
        link.send(Result("op/1/do"))
        link.send(StateChanged(ContainerReport("101", 1, 102)))
        await controller.expect(Heartbeat)  # heartbeats go on meanwhile
        await controller.expect(Heartbeat)
        recorder.proceed.set()
        await controller.expect(StateChanged)
        assert controller.kinds() == ["Hello", "Inventory", "Result", "StateChanged"]


async def test_old_samples_are_dropped_and_replies_are_not() -> None:
    recorder = Recorder()
    recorder.proceed.clear()
    async with FakeController(PAIR.public) as controller, running_link(controller, recorder) as link:
        await recorder.taking.wait()
        for number in range(10):
            link.offer([Samples(float(number), NODE_SAMPLE, ())])
            link.send(Accepted(f"op/{number}/do"))
        recorder.proceed.set()
        ticks = [(await controller.expect(Samples)).sampled_at for _ in range(3)]
        assert ticks == [7.0, 8.0, 9.0]
        assert controller.kinds().count("Accepted") == 10


async def test_what_is_sent_without_a_session_is_dropped() -> None:
    async with FakeController(PAIR.public) as controller:
        controller.welcome_at_once = False
        async with running_link(controller, Recorder()) as link:
            await controller.expect(Hello)
            link.send(Accepted("lost"))
            await controller.welcome()
            await controller.expect(Inventory)
            link.send(Accepted("kept"))
            assert (await controller.expect(Accepted)).command == "kept"


async def test_an_unknown_command_gets_a_typed_error_and_an_unknown_message_is_passed_over() -> None:
    async with FakeController(PAIR.public) as controller, running_link(controller, Recorder()):
        await controller.expect_ready()
        await controller.send_frames(b"\xc1 garbage")
        await controller.send_frames(msgpack.packb({"type": "from-the-future"}))
        future = {"type": "command", "id": "op/9/do", "arguments": {"name": "container.teleport"}}
        await controller.send_frames(msgpack.packb(future))
        result = await controller.expect(Result)
        assert (result.command, result.error and result.error.code) == ("op/9/do", "unsupported")


async def test_more_than_one_frame_ends_the_session() -> None:
    async with FakeController(PAIR.public) as controller, running_link(controller, Recorder()):
        await controller.expect_ready()
        await controller.send_frames(b"one", b"two")
        assert (await controller.expect(Hello)).connection == 2


async def test_a_message_over_the_limit_is_dropped_and_the_link_goes_on() -> None:
    async with FakeController(PAIR.public) as controller, running_link(controller, Recorder()) as link:
        await controller.expect_ready()
        huge = ContainerReport("101", 1, 103, config={f"user.{n}": "x" * 4000 for n in range(400)})
        link.send(StateChanged(huge))
        link.send(Accepted("after"))
        assert (await controller.expect(Accepted)).command == "after"
        assert "StateChanged" not in controller.kinds()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1"])
async def test_an_absent_controller_does_not_end_the_link(address: str) -> None:
    link = Link(address, PAIR, keys.generate().public, Identity("b", "m", "i"), SystemClock(), Recorder())
    task = asyncio.create_task(link.run())
    await asyncio.sleep(0.3)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
