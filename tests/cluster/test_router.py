"""The link over real CURVE sockets on loopback: who is heard, who is not, and what survives."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import zmq

from common.clock import SystemClock
from common.codec import encode
from common.commands import StartContainer
from common.errors import Conflict, InvalidRequest, Unavailable
from common.keys import generate
from common.messages import Command, Outcome, Ping, Refused, Result, Welcome
from common.states import NodeStatus
from controller.dispatch import duplicates
from controller.dispatch import router as router_module
from controller.dispatch.dispatcher import Dispatcher
from controller.dispatch.router import Router
from controller.dispatch.sessions import LinkSettings
from tests.helpers.fake_agent import FakeAgent
from tests.helpers.recording_listener import RecordingListener

SETTINGS = LinkSettings(heartbeat_interval=0.2, heartbeat_timeout=1.0, tick=0.05, accept_timeout=0.3)
SERVER = generate()
Join = Callable[..., FakeAgent]


class Controller:
    """A dispatcher on a real router, with the doubles that talk to it."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*", epoch: int = 1) -> None:
        self.clock = SystemClock()
        self.listener = RecordingListener()
        self.router = Router(endpoint, SERVER, self.clock)
        self.dispatcher = Dispatcher(
            router=self.router, clock=self.clock, epoch=epoch, settings=SETTINGS, listener=self.listener
        )
        self.agents: list[FakeAgent] = []

    def agent(self, node: str | None = None, **options: object) -> FakeAgent:
        """A double; enrolled when it has a node."""
        agent = FakeAgent(f"tcp://127.0.0.1:{self.router.port}", SERVER.public, **options)  # type: ignore[arg-type]
        self.agents.append(agent)
        if node is not None:
            self.dispatcher.enrol(node, agent.keys.public)
        return agent

    def call(self, node: str, command: str = "op/1/do", seconds: float = 10.0) -> Awaitable[Result]:
        deadline = self.clock.monotonic() + seconds
        return self.dispatcher.call(node, StartContainer("101"), command=command, generation=1, deadline=deadline)


@asynccontextmanager
async def running(controller: Controller) -> AsyncIterator[Controller]:
    controller.dispatcher.start()
    try:
        yield controller
    finally:
        for agent in controller.agents:
            await agent.close()
        await controller.dispatcher.close()


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    descriptors = open_descriptors()
    async with running(Controller()) as made:
        yield made
    assert open_descriptors() <= descriptors


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 counters have no event
            await asyncio.sleep(0.01)


async def test_a_command_goes_there_and_back(controller: Controller) -> None:
    controller.listener.generations = {"101": 3}
    agent = controller.agent("node1")
    await agent.serve()
    assert agent.confirmed == [{"101": 3}]
    assert controller.dispatcher.status("node1") == (NodeStatus.ONLINE, "")
    result = await controller.call("node1")
    assert result == Result("op/1/do", outcome=Outcome())
    controller.dispatcher.acknowledge("node1", ["op/1/do"])
    await until(lambda: agent.acknowledged == ["op/1/do"])
    assert agent.welcome is not None and agent.commands[0].session == agent.welcome.session


async def test_an_unknown_key_is_refused_and_enrolling_it_later_lets_it_in(controller: Controller) -> None:
    agent = controller.agent()
    agent.connect()
    with pytest.raises(TimeoutError):
        await agent.say_hello()
        await agent.receive(0.3)
    assert controller.router.drops.counts["handshake with an unknown key"] == 1
    controller.dispatcher.enrol("node1", agent.keys.public)
    await agent.join()


async def test_without_its_zap_handler_nobody_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module.zap, "answer", lambda request, user_of: 1 / 0)
    async with running(Controller()) as controller:
        agent = controller.agent("node1")
        agent.connect()
        with pytest.raises(TimeoutError):
            await agent.say_hello()
            await agent.receive(0.3)
        monkeypatch.undo()
        await controller.agent("node2").join()


async def test_without_a_zap_handler_nobody_gets_a_connection(controller: Controller) -> None:
    agent = controller.agent("node1")
    assert controller.router._zap is not None
    controller.router._zap.close()
    agent.connect()
    with pytest.raises(TimeoutError):
        await agent.say_hello()
        await agent.receive(0.3)
    assert controller.router.drops.counts["unknown key"] == 0, "it was let in and heard"


async def test_a_message_that_came_before_a_send_is_read_without_another_event() -> None:
    """The descriptor is edge-triggered: a send takes the signal of what has arrived."""
    heard: list[tuple[bytes, str, bytes]] = []
    router = Router("tcp://127.0.0.1:*", SERVER, SystemClock())
    router.start(lambda *message: heard.append(message))
    agent = FakeAgent(f"tcp://127.0.0.1:{router.port}", SERVER.public)
    try:
        router.allow(agent.keys.public)
        agent.connect()
        await agent.say_hello()
        await until(lambda: len(heard) == 1)
        for count in range(2, 7):
            await agent.beat()
            time.sleep(0.05)  # noqa: ASYNC251 the message arrives while the loop does not look
            assert router.send(heard[0][0], b"x")
            await until(lambda count=count: len(heard) == count, timeout=2)
        assert {key for _, key, _ in heard} == {agent.keys.public}
    finally:
        await agent.close()
        router.close()


async def test_a_client_without_curve_is_not_heard(controller: Controller) -> None:
    agent = controller.agent("node1")
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.linger = 0
        plain.connect(f"tcp://127.0.0.1:{controller.router.port}")
        plain.send(encode(Ping(1)))
        await agent.serve()
        await controller.call("node1")
    assert sum(controller.dispatcher.drops.counts.values()) == 0


async def test_a_removed_node_is_neither_heard_nor_spoken_to(controller: Controller) -> None:
    agent = controller.agent("node1")
    await agent.serve()
    waiting = asyncio.ensure_future(controller.call("node1", "op/2/do"))
    await waiting
    agent.behaviour = lambda command: Result(command.id, error=None)
    slow = controller.agent("node2", behaviour=lambda command: Result("another"))
    await slow.serve()
    unanswered = asyncio.ensure_future(controller.call("node2", "op/3/do"))
    await until(lambda: len(slow.commands) == 1)
    controller.dispatcher.remove("node2")
    controller.dispatcher.remove("node1")
    with pytest.raises(Unavailable):
        await unanswered
    with pytest.raises(Unavailable):
        await controller.call("node1", "op/4/do")
    heard, commands = len(controller.listener.heard), len(agent.commands)
    before = controller.router.drops.counts["unknown key"]
    await until(lambda: controller.router.drops.counts["unknown key"] > before + 2)
    await agent.stop()
    with suppress(TimeoutError):
        agent.connect()
        await agent.say_hello()
        pytest.fail(f"answered: {await agent.receive(0.3)}")
    assert (len(controller.listener.heard), len(agent.commands)) == (heard, commands)


async def test_a_claimed_routing_id_gets_nothing(controller: Controller) -> None:
    honest, thief = controller.agent("node1"), controller.agent("node2")
    await honest.serve()
    thief.connect(routing_id=b"\x01node")
    await thief.say_hello()
    with pytest.raises(TimeoutError):
        await thief.receive(0.3)
    assert controller.router.drops.counts["not two frames from an unnamed peer"] == 1
    await controller.call("node1")


async def test_malformed_messages_are_dropped_and_the_link_goes_on(controller: Controller) -> None:
    agent = controller.agent("node1")
    await agent.serve()
    for frames in ([b""], [b"\xc1"], [b"\x81\xa4type\xa5hello"], [b"\x91" * 5000], [b"a", b"b"], [b"x"] * 2000):
        await agent.send_frames(*frames)
    await agent.send_frames(encode(Ping(1)))
    await agent.send_frames(encode(Result("nobody/waits", outcome=Outcome())))
    await controller.call("node1")
    assert controller.dispatcher.drops.counts["malformed"] == 5
    assert controller.router.drops.counts["not two frames from an unnamed peer"] == 2
    assert controller.dispatcher.drops.counts["result nobody waits for"] == 1


async def test_an_oversized_message_ends_the_connection_only(controller: Controller) -> None:
    agent = controller.agent("node1")
    await agent.join()
    await agent.send_frames(b"x" * (1024 * 1024 + 1))
    await controller.listener.wait_status("node1", NodeStatus.OFFLINE)
    assert controller.dispatcher.drops.counts["malformed"] == 0, "it was read whole"
    await agent.serve()
    await controller.call("node1")


async def test_a_silent_agent_is_offline_and_online_again_after_its_inventory(controller: Controller) -> None:
    agent = controller.agent("node1")
    await agent.serve()
    await agent.stop()
    stopped = time.monotonic()
    await controller.listener.wait_status("node1", NodeStatus.SUSPECT)
    await controller.listener.wait_status("node1", NodeStatus.OFFLINE)
    assert time.monotonic() - stopped < SETTINGS.heartbeat_timeout + 2 * SETTINGS.tick + 1.0
    waiting = asyncio.ensure_future(controller.call("node1"))
    await asyncio.sleep(0)
    assert not waiting.done()
    await agent.serve()
    await waiting
    assert controller.listener.of("status", "node1") == ["Online", "Suspect", "Offline", "Online"]


async def test_a_command_survives_agents_that_die_before_they_answer(controller: Controller) -> None:
    agent = controller.agent("node1")
    await agent.join()
    waiting = asyncio.ensure_future(controller.call("node1"))
    for _ in range(3):
        first = await agent.expect(Command)
        assert first.id == "op/1/do"
        await agent.join()
    await agent.serve()
    await waiting
    assert agent.effects == {"op/1/do": 1}
    sessions = {command.session for command in agent.commands}
    assert agent.welcome is not None and sessions == {agent.welcome.session}


async def test_agents_come_back_to_a_restarted_controller_by_its_hint() -> None:
    async with running(Controller(epoch=1)) as first:
        port = first.router.port
        agent = first.agent("node1")
        first.agents.clear()
        await agent.serve()
    second = Controller(f"tcp://127.0.0.1:{port}", epoch=2)
    second.agents.append(agent)
    second.dispatcher.enrol("node1", agent.keys.public)
    async with running(second):
        await until(lambda: [refused.code for refused in agent.refusals][:1] == ["stale"])
        await agent.stop()
        await agent.serve()
        assert agent.welcome is not None and agent.welcome.epoch == 2
        await second.call("node1")


async def test_two_hosts_with_one_key_are_kept_out_until_one_of_them_ends(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "QUIET", 0.5)
    agent = controller.agent("node1")
    await agent.serve()
    double = controller.agent(keys=agent.keys, machine_id="other")
    double.connect()
    await double.say_hello()
    assert isinstance(refusal := await double.receive(), Refused) and refusal.code == "duplicate"
    await controller.listener.wait_status("node1", NodeStatus.OFFLINE)
    assert "two agents" in controller.dispatcher.status("node1")[1]
    await until(lambda: [refused.code for refused in agent.refusals][:1] == ["stale"])
    waiting = asyncio.ensure_future(controller.call("node1"))
    await agent.stop()
    await asyncio.sleep(duplicates.QUIET)
    await double.serve()
    await waiting
    assert (agent.effects, double.effects) == ({}, {"op/1/do": 1})


async def test_a_hung_controller_does_not_take_its_agents_for_dead(controller: Controller) -> None:
    agent = controller.agent("node1")
    await agent.serve()
    time.sleep(1.5 * SETTINGS.heartbeat_timeout)  # noqa: ASYNC251 the loop is to hang
    await asyncio.sleep(SETTINGS.heartbeat_timeout)
    assert controller.listener.of("status", "node1") == ["Online"]


async def test_many_agents_are_reached_at_once(controller: Controller) -> None:
    agents = {f"node{number}": controller.agent(f"node{number}") for number in range(60)}
    await asyncio.gather(*(agent.serve() for agent in agents.values()))
    calls = [controller.call(node, f"op/{number}/do") for node in agents for number in range(20)]
    await asyncio.gather(*calls)
    assert all(sum(agent.effects.values()) == len(agent.effects) == 20 for agent in agents.values())


async def test_silent_connections_do_not_keep_agents_out(controller: Controller) -> None:
    silent = [socket.create_connection(("127.0.0.1", controller.router.port)) for _ in range(100)]
    try:
        async with asyncio.timeout(5):
            await controller.agent("node1").join()
    finally:
        for connection in silent:
            connection.close()


async def test_one_key_cannot_be_two_nodes_and_a_new_key_replaces_the_old(controller: Controller) -> None:
    agent = controller.agent("node1")
    await agent.serve()
    with pytest.raises(Conflict):
        controller.dispatcher.enrol("node2", agent.keys.public)
    with pytest.raises(InvalidRequest):
        controller.dispatcher.enrol("node2", "#" * 40)
    rejoined = controller.agent("node1")
    await until(lambda: controller.router.drops.counts["unknown key"] > 0)
    await rejoined.serve()
    await controller.call("node1")
    assert (len(agent.commands), len(rejoined.commands)) == (0, 1)


async def test_a_refused_address_is_told_and_leaves_nothing_open(controller: Controller) -> None:
    other = Controller(f"tcp://127.0.0.1:{controller.router.port}")
    with pytest.raises(OSError, match="in use"):
        other.dispatcher.start()
    with pytest.raises(RuntimeError):
        _ = other.router.port


async def test_welcome_names_the_node_and_the_times(controller: Controller) -> None:
    agent = controller.agent("node1")
    agent.connect()
    await agent.say_hello(newest=9)
    welcome = await agent.expect(Welcome)
    assert (welcome.node, welcome.protocol, welcome.epoch) == ("node1", 1, 1)
    assert (welcome.heartbeat_interval, welcome.heartbeat_timeout) == (0.2, 1.0)
    await agent.expect(Ping)
