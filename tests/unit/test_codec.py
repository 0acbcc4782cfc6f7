"""The codec: every message there and back, and no bytes whatever make it fail in another way than its own."""

from __future__ import annotations

import math
import types
import typing

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import fields

from common import codec, commands, messages, reports
from common.commands import COMMANDS, UpdateContainer
from common.errors import InvalidRequest, TooLarge
from common.messages import Command, Heartbeat, StateChanged, to_plain
from common.reports import ContainerSpec

PROFILE = settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
COUNT = st.integers(0, 2**63 - 1)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)


def _struct(kind: type) -> st.SearchStrategy[object]:
    return st.builds(kind, **{field.name: _value(field.type) for field in fields(kind)})


def _value(annotation: object) -> st.SearchStrategy[object]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return {int: COUNT, float: FLOAT.map(abs), str: TEXT}[arguments[0]]
    if origin in (typing.Union, types.UnionType):
        return st.one_of([_value(argument) for argument in arguments])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(_value(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*[_value(argument) for argument in arguments])
    if origin is dict:
        return st.dictionaries(_value(arguments[0]), _value(arguments[1]), max_size=4)
    simple = {
        int: st.integers(-(2**63), 2**63 - 1),
        float: FLOAT,
        str: TEXT,
        bool: st.booleans(),
        type(None): st.none(),
    }
    return simple[annotation] if annotation in simple else _struct(annotation)  # type: ignore[index,arg-type]


AGENT = st.one_of([_struct(kind) for kind in messages.AgentMessage.__args__])
CONTROLLER = st.one_of([_struct(kind) for kind in messages.ControllerMessage.__args__])


@PROFILE
@given(AGENT)
def test_messages_of_the_agent_come_back_as_they_were(message: messages.AgentMessage) -> None:
    assert codec.decode_from_agent(codec.encode(message)) == message


@PROFILE
@given(CONTROLLER)
def test_messages_of_the_controller_come_back_as_they_were(message: messages.ControllerMessage) -> None:
    assert codec.decode_from_controller(codec.encode(message)) == message


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_command_can_be_sent(kind: type[commands.Arguments]) -> None:
    @settings(max_examples=5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(_struct(kind))
    def there_and_back(arguments: commands.AnyArguments) -> None:
        command = Command("op/1/do", 1, "s", 1, 1.0, arguments)
        assert codec.decode_from_controller(codec.encode(command)) == command

    there_and_back()


@PROFILE
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_one_way(packed: bytes) -> None:
    for decode in (codec.decode_from_agent, codec.decode_from_controller):
        with pytest.raises((InvalidRequest, TooLarge)):
            decode(packed)
    assert codec.unknown_command_id(packed) is None


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.binary(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@PROFILE
@given(AGENT, st.data())
def test_a_mutated_message_is_a_message_or_refused(message: messages.AgentMessage, data: st.DataObject) -> None:
    plain = to_plain(message)
    plain[data.draw(st.sampled_from(sorted(plain)))] = data.draw(PLAIN)
    try:
        decoded = codec.decode_from_agent(msgpack.packb(plain))
    except (InvalidRequest, TooLarge):
        return
    assert codec.decode_from_agent(codec.encode(decoded)) == decoded


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    with pytest.raises(InvalidRequest):
        codec.decode_from_agent(codec.encode(Heartbeat(1, number, 0.0)))


def test_unknown_fields_are_passed_over_and_unknown_messages_refused() -> None:
    plain = {"type": "ping", "sequence": 7, "from the future": {"a": [1]}}
    assert codec.decode_from_controller(msgpack.packb(plain)) == messages.Ping(7)
    with pytest.raises(InvalidRequest):
        codec.decode_from_controller(msgpack.packb({"type": "from-the-future"}))
    with pytest.raises(InvalidRequest):
        codec.decode_from_agent(msgpack.packb(plain))  # the wrong way round


@pytest.mark.parametrize(
    "packed",
    [
        msgpack.packb({"type": "ping", "sequence": -1}),
        msgpack.packb({"type": "ping", "sequence": "1"}),
        msgpack.packb({"type": "ping", "sequence": 1.5}),
        msgpack.packb({"type": "ping", "sequence": True}),
        msgpack.packb({"type": "ping"}),
        msgpack.packb({"type": "ping", "sequence": 2**63}),
        msgpack.packb({1: 2}),
        msgpack.packb({"type": "ping", "sequence": 1, "x": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"type": "ping", "sequence": 1, "x": msgpack.Timestamp(1)}),
        msgpack.packb({"type": "ping", "sequence": 1, "x": b"binary"}),
        b"\xdf\xff\xff\xff\xff",  # a map that claims 4 G entries
        b"\xdd\xff\xff\xff\xff",
        b"\x81\xa4type\xa4pin",
        msgpack.packb({"type": "ping", "sequence": 1}) + b"\x00",
        b"\x91" * 600,
        b"",
    ],
)
def test_hostile_bytes_are_refused(packed: bytes) -> None:
    with pytest.raises(InvalidRequest):
        codec.decode_from_controller(packed)


def test_depth_and_size_are_limited() -> None:
    deep: object = 1
    for _ in range(codec.MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="too deep"):
        codec.decode_from_controller(msgpack.packb({"type": "ping", "sequence": 1, "x": deep}))
    with pytest.raises(TooLarge):
        codec.decode_from_agent(b"\x00" * (codec.MAX_MESSAGE + 1))
    config = {f"user.{n}": "x" * 4096 for n in range(300)}
    with pytest.raises(TooLarge):
        codec.encode(StateChanged(reports.ContainerReport("a", 1, 103, config)))


def test_the_longest_configuration_keys_can_cross_the_wire() -> None:
    config = {"user." + "k" * 128: "v", "environment." + "K" * 128: "v"}
    spec = ContainerSpec("a", 1, "a", "00:16:3e:00:00:01", config)
    command = Command("op/1/do", 1, "s", 1, 1.0, UpdateContainer(spec))
    assert codec.decode_from_controller(codec.encode(command)) == command


def test_a_command_that_is_not_understood_still_has_its_id() -> None:
    plain = {"type": "command", "id": "op/1/do", "arguments": {"name": "container.teleport"}}
    assert codec.unknown_command_id(msgpack.packb(plain)) == "op/1/do"
    assert codec.unknown_command_id(msgpack.packb({"type": "ping", "sequence": 1})) is None
    assert codec.unknown_command_id(msgpack.packb({"type": "command", "id": 5})) is None
