"""The session rules, one by one and under anything that a network and two clocks can do."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import InvalidRequest
from common.messages import OLDEST_PROTOCOL, PROTOCOL, Hello
from common.states import NodeStatus
from controller.dispatch.duplicates import QUIET
from controller.dispatch.sessions import MISSED_HEARTBEATS, LinkSettings, NodeSession, Refusal, Session, Watch
from tests.helpers.fake_agent import hello

SETTINGS = LinkSettings()
SUSPECT_AFTER = MISSED_HEARTBEATS * SETTINGS.heartbeat_interval
ONE, TWO = b"\0\0\0\0\1", b"\0\0\0\0\2"


def node() -> NodeSession:
    numbers = itertools.count(1)
    return NodeSession(SETTINGS, lambda: f"session{next(numbers)}")


def admitted(of: NodeSession, connection: bytes, message: Hello, now: float) -> Session:
    session = of.hello(connection, message, now)
    assert isinstance(session, Session)
    return session


def refused(of: NodeSession, connection: bytes, message: Hello, now: float) -> str:
    refusal = of.hello(connection, message, now)
    assert isinstance(refusal, Refusal)
    return refusal.code


def online(of: NodeSession, connection: bytes = ONE, message: Hello | None = None, now: float = 0.0) -> Session:
    session = admitted(of, connection, message or hello(), now)
    assert of.inventory_done(session, now)
    of.judge(now)
    assert of.status is NodeStatus.ONLINE
    return session


@pytest.mark.parametrize(
    ("oldest", "newest", "served"),
    [
        (PROTOCOL, PROTOCOL, True),
        (0, OLDEST_PROTOCOL, True),
        (PROTOCOL, PROTOCOL + 5, True),
        (PROTOCOL + 1, PROTOCOL + 1, False),
        (0, OLDEST_PROTOCOL - 1, False),
    ],
)
def test_protocol_ranges_must_overlap(oldest: int, newest: int, served: bool) -> None:
    outcome = node().hello(ONE, hello(oldest=oldest, newest=newest), 0)
    assert isinstance(outcome, Session) == served
    if isinstance(outcome, Refusal):
        assert outcome.code == "protocol"


def test_a_refused_hello_leaves_the_session_alone() -> None:
    of = node()
    session = online(of)
    assert refused(of, TWO, hello(oldest=99, newest=99), 1) == "protocol"
    assert of.heard(ONE, 1) is session


def test_only_the_inventory_makes_a_node_online() -> None:
    of = node()
    session = admitted(of, ONE, hello(), 0)
    of.heard(ONE, 1)
    of.judge(1)
    assert of.status is NodeStatus.OFFLINE and "inventory" in of.reason
    assert of.inventory_done(session, 2)
    assert of.judge(2)
    assert (of.status, of.reason) == (NodeStatus.ONLINE, "")


def test_silence_makes_it_suspect_then_offline_and_ends_the_session() -> None:
    of = node()
    online(of, now=0)
    assert not of.judge(SUSPECT_AFTER)
    assert of.judge(SUSPECT_AFTER + 0.1) and of.status is NodeStatus.SUSPECT
    of.heard(ONE, SUSPECT_AFTER + 0.2)
    assert of.judge(SUSPECT_AFTER + 0.2) and of.status is NodeStatus.ONLINE
    assert of.judge(SUSPECT_AFTER + 0.3 + SETTINGS.heartbeat_timeout) and of.status is NodeStatus.OFFLINE
    assert of.heard(ONE, 20) is None
    online(of, ONE, hello(connection=2), 21)


def test_offline_shows_within_ten_seconds_by_default() -> None:
    assert SETTINGS.heartbeat_timeout + 2 * SETTINGS.tick <= 10


def test_a_newer_connection_of_the_same_agent_takes_over_and_the_older_is_ignored() -> None:
    of = node()
    online(of)
    session = admitted(of, TWO, hello(connection=2), 1)
    assert of.heard(ONE, 1) is None
    assert of.heard(TWO, 1) is session
    assert refused(of, ONE, hello(connection=1), 1) == "stale"


def test_a_repeated_hello_changes_nothing() -> None:
    of = node()
    session = online(of)
    assert of.hello(ONE, hello(), 1) is session and session.ready


def test_a_hello_that_comes_again_on_another_connection_is_nobody() -> None:
    of = node()
    session = online(of)
    assert refused(of, TWO, hello(), 1) == "stale"
    assert of.session is session
    of.end("broken")
    assert refused(of, TWO, hello(), 2) == "stale"
    admitted(of, TWO, hello(connection=2), 3)


def test_an_old_hello_on_the_connection_that_counts_leaves_it_alone() -> None:
    of = node()
    online(of)
    session = admitted(of, TWO, hello(connection=2), 1)
    assert of.hello(TWO, hello(), 2) is session


def test_a_late_inventory_of_an_older_session_does_not_make_the_newer_ready() -> None:
    of = node()
    old = admitted(of, ONE, hello(), 0)
    new = admitted(of, TWO, hello(connection=2), 1)
    assert not of.inventory_done(old, 2)
    assert not new.ready


def test_a_restarted_agent_of_the_same_host_takes_over_at_once() -> None:
    of = node()
    online(of)
    admitted(of, TWO, hello(instance="restarted"), 0.1)


TWIN = {"instance": "twin", "machine_id": "other", "boot_id": "other boot"}


def test_another_host_with_the_key_is_let_in_once_the_first_missed_its_heartbeats() -> None:
    of = node()
    online(of)
    admitted(of, TWO, hello(**TWIN), SUSPECT_AFTER + 0.1)


def quarantined(now: float = SUSPECT_AFTER) -> NodeSession:
    of = node()
    online(of)
    assert refused(of, TWO, hello(**TWIN), now) == "duplicate"
    return of


def test_two_hosts_with_one_key_are_both_kept_out_at_once() -> None:
    of = quarantined()
    assert of.judge(SUSPECT_AFTER) and of.status is NodeStatus.OFFLINE
    assert "two agents" in of.reason and "host machine" in of.reason and "host other" in of.reason
    assert of.heard(ONE, SUSPECT_AFTER) is None and of.heard(TWO, SUSPECT_AFTER) is None
    assert refused(of, ONE, hello(connection=2), SUSPECT_AFTER + 1) == "duplicate"


def test_a_node_that_was_not_online_yet_is_told_of_its_two_agents_too() -> None:
    of = node()
    admitted(of, ONE, hello(), 0)
    assert refused(of, TWO, hello(**TWIN), 1) == "duplicate"
    assert of.judge(1) and "two agents" in of.reason and not of.judge(1.5)


def test_two_hosts_stay_out_as_long_as_both_ask() -> None:
    of = quarantined(now=0)
    for turn in range(1, 60):
        assert refused(of, ONE, hello(connection=turn + 1), 10 * turn) == "duplicate"
        assert refused(of, TWO, hello(connection=turn, **TWIN), 10 * turn + 9.9) == "duplicate"


def test_the_one_that_remains_is_let_in_even_when_it_has_restarted() -> None:
    of = quarantined(now=0)
    assert of.judge(0)
    assert refused(of, ONE, hello(connection=2), QUIET - 0.1) == "duplicate"
    session = admitted(of, ONE, hello(connection=1, instance="restarted"), QUIET)
    assert of.inventory_done(session, QUIET) and of.judge(QUIET) and (of.status, of.reason) == (NodeStatus.ONLINE, "")


def test_hosts_without_a_machine_id_are_told_apart_by_their_boot() -> None:
    of = node()
    online(of, message=hello(machine_id=""))
    admitted(of, TWO, hello(machine_id="", instance="restarted"), 0.1)
    assert refused(of, ONE, hello(machine_id="", instance="twin", boot_id="other"), 0.2) == "duplicate"


def test_a_resumed_copy_of_a_machine_is_noticed_by_its_connections_number() -> None:
    of = node()
    online(of)
    # The copy woke up, found its connection dead and opened the next one; the original does the same now.
    admitted(of, TWO, hello(connection=2, monotonic=5001.0), 1)
    assert refused(of, ONE, hello(connection=2, monotonic=5002.0), 2) == "duplicate"
    assert of.judge(2) and "copies of host machine" in of.reason
    number = {ONE: 2, TWO: 2}
    for turn in range(1, 20):
        for connection in (ONE, TWO):
            number[connection] += 1
            again = hello(connection=number[connection], monotonic=5000.0 + 10 * turn + connection[-1])
            assert refused(of, connection, again, 2 + 9 * turn) == "duplicate"
    assert refused(of, ONE, hello(connection=30), 2 + 9 * 19 + QUIET - 0.1) == "duplicate"
    admitted(of, ONE, hello(connection=31), 2 + 9 * 19 + QUIET)


def test_two_live_agents_of_one_host_do_not_take_turns_and_the_fenced_one_is_shown() -> None:
    of = node()
    online(of)
    newer = admitted(of, TWO, hello(instance="second"), 1)
    assert of.inventory_done(newer, 1) and not of.judge(1)
    assert refused(of, ONE, hello(connection=2), 2) == "duplicate"
    assert of.judge(2) and of.status is NodeStatus.ONLINE and "second agent" in of.reason
    of.heard(TWO, 3)
    assert refused(of, ONE, hello(connection=3), 4) == "duplicate"
    admitted(of, ONE, hello(connection=4), 3 + SUSPECT_AFTER + 0.1)


def test_a_fenced_agent_that_has_ended_is_shown_no_longer() -> None:
    of = node()
    online(of)
    of.inventory_done(admitted(of, TWO, hello(instance="second"), 1), 1)
    assert refused(of, ONE, hello(connection=2), 2) == "duplicate"
    assert of.judge(2)
    of.heard(TWO, 2 + QUIET)
    assert of.judge(2 + QUIET) and (of.status, of.reason) == (NodeStatus.ONLINE, "")


def test_a_node_that_joins_anew_is_not_kept_out() -> None:
    of = quarantined()
    of.shut_out("it has joined with a new key")
    admitted(of, TWO, hello(**TWIN), SUSPECT_AFTER + 1)


def test_the_agents_clock_is_learnt_from_the_newest_heartbeat() -> None:
    session = admitted(node(), ONE, hello(monotonic=5000.0), 100)
    assert session.on_agent_clock(110) == 5010
    session.heartbeat(2, 6000.0, 200)
    session.heartbeat(1, 5001.0, 201)
    assert session.on_agent_clock(210) == 6010


def test_time_in_which_nobody_looked_is_excused() -> None:
    of, watch = node(), Watch(SETTINGS, 0)
    online(of)
    assert watch.gap(SETTINGS.tick) == 0
    gap = watch.gap(SETTINGS.tick + 60)
    assert gap == 60 - 2 * SETTINGS.tick
    of.excuse(gap, 60.5)
    assert not of.judge(60.5)
    assert of.session is not None, "nor does the session end"
    assert of.judge(60.5 + SETTINGS.heartbeat_timeout) and of.status is NodeStatus.OFFLINE


@pytest.mark.parametrize("wrong", [{"tick": 0.0}, {"heartbeat_interval": -1.0}, {"heartbeat_timeout": 4.5}])
def test_times_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        LinkSettings(**wrong)


class Network(RuleBasedStateMachine):
    """Two agents with one key, on one host or two; their messages arrive late, twice or out of order, clocks jump."""

    @initialize(same_host=st.booleans())
    def begin(self, same_host: bool) -> None:
        self.node = node()
        self.watch = Watch(SETTINGS, 0)
        self.now = 0.0
        self.looked = 0.0
        self.machines = ["machine0", "machine0" if same_host else "machine1"]
        self.connections = [0, 0]
        self.instances = [1, 2]
        self.next_instance = 3
        self.flying: list[tuple[bytes, Hello | None]] = []
        self.last_good: float | None = None
        """When a message of the ready session last came, by a clock that stops while nobody looks."""
        self.excused = 0.0
        self.takeovers: list[tuple[str, str]] = []
        self.asked: dict[str, float] = {}
        """When each host last said HELLO since two of them were found."""
        self.last_old = float("-inf")
        """When a HELLO came that was not newer than all before from its agent: of a copy of it, for all one knows."""
        self.newest: dict[str, int] = {}

    def connection(self, agent: int) -> bytes:
        return bytes([0, agent, self.instances[agent] % 256, *divmod(self.connections[agent], 256)])

    @rule(agent=st.sampled_from([0, 1]))
    def connects(self, agent: int) -> None:
        self.connections[agent] += 1
        instance = f"instance{self.instances[agent]}"
        message = hello(
            instance=instance,
            machine_id=self.machines[agent],
            connection=self.connections[agent],
            monotonic=self.now + 10_000,
        )
        self.flying.append((self.connection(agent), message))

    @rule(agent=st.sampled_from([0, 1]))
    def restarts(self, agent: int) -> None:
        self.instances[agent] = self.next_instance
        self.next_instance += 1
        self.connections[agent] = 0

    @rule(agent=st.sampled_from([0, 1]))
    def speaks(self, agent: int) -> None:
        self.flying.append((self.connection(agent), None))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), again=st.booleans())
    def arrives(self, data: st.DataObject, again: bool) -> None:
        index = data.draw(st.integers(0, len(self.flying) - 1))
        connection, message = self.flying[index] if again else self.flying.pop(index)
        if message is None:
            self.arrives_word(connection)
        else:
            self.arrives_hello(connection, message)

    def arrives_word(self, connection: bytes) -> None:
        before = self.node.session
        session = self.node.heard(connection, self.now)
        assert session is before if before is not None and before.connection == connection else session is None
        if session is not None and session.ready:
            self.last_good = self.now

    def arrives_hello(self, connection: bytes, message: Hello) -> None:
        before = self.node.session
        try:
            self.hello_arrives(before, connection, message)
        finally:
            self.newest[message.instance] = max(message.connection, self.newest.get(message.instance, 0))

    def hello_arrives(self, before: Session | None, connection: bytes, message: Hello) -> None:
        alive = before is not None and self.now - before.heard <= SUSPECT_AFTER
        outcome = self.node.hello(connection, message, self.now)
        other = next((at for host, at in self.asked.items() if host != message.machine_id), None)
        if isinstance(outcome, Refusal) and outcome.code == "stale":
            assert message.connection <= self.newest[message.instance] and self.node.session is before
            return
        if isinstance(outcome, Refusal):
            self.refused(before, message, other)
            return
        assert other is None or self.now - other >= QUIET, "let in while the other host asks"
        self.asked = {}
        assert self.node.session is outcome and outcome.connection == connection
        if before is None or outcome is before:
            return
        assert not outcome.ready
        if before.hello.instance != message.instance and alive:
            assert before.hello.machine_id == message.machine_id
            pair = (before.hello.instance, message.instance)
            assert pair[::-1] not in self.takeovers[-8:]
            self.takeovers.append(pair)
        elif before.hello.instance == message.instance:
            assert message.connection >= before.hello.connection

    def refused(self, before: Session | None, message: Hello, other: float | None) -> None:
        if before is None:
            if message.connection <= self.newest.get(message.instance, 0):
                self.last_old = self.now
            assert self.now - max(self.last_old, other or 0.0) < QUIET, "kept out alone"
        elif self.node.session is None:
            assert before.hello.machine_id != message.machine_id, "one host is two"
            self.asked = {before.hello.machine_id: before.heard}
            self.last_good = None
        if self.node.session is None:
            self.asked[message.machine_id] = self.now
        else:
            assert self.node.session is before

    @rule()
    def inventory_is_processed(self) -> None:
        session = self.node.session
        if session is not None:
            assert self.node.inventory_done(session, self.now)
            self.last_good = self.now

    @rule(seconds=st.floats(0.01, 0.5))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.look()

    @rule(seconds=st.floats(1.0, 100_000.0))
    def the_clock_jumps_or_the_loop_hangs(self, seconds: float) -> None:
        before = self.node.status
        self.now += seconds
        self.look()
        if before is NodeStatus.ONLINE and not self.asked:
            assert self.node.status is not NodeStatus.OFFLINE

    def look(self) -> None:
        gap = self.watch.gap(self.now)
        self.node.excuse(gap, self.now)
        if self.last_good is not None:
            self.last_good = min(self.now, self.last_good + gap)
        self.node.judge(self.now)
        self.looked = self.now

    @invariant()
    def status_follows_the_silence_alone(self) -> None:
        if self.looked != self.now or self.last_good is None:
            return
        self.node.judge(self.now)
        silence = self.now - self.last_good
        if silence < SUSPECT_AFTER - 0.001:
            assert self.node.status is NodeStatus.ONLINE
        elif SUSPECT_AFTER + 0.001 < silence < SETTINGS.heartbeat_timeout - 0.001:
            assert self.node.status is NodeStatus.SUSPECT
        elif silence > SETTINGS.heartbeat_timeout + 0.001:
            assert self.node.status is NodeStatus.OFFLINE

    @invariant()
    def a_reason_is_given_when_not_online(self) -> None:
        assert self.node.reason or self.node.status is NodeStatus.ONLINE

    @invariant()
    def two_hosts_have_no_session(self) -> None:
        assert not (self.asked and self.node.session)


Network.TestCase.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None, database=None)
TestNetwork = Network.TestCase
