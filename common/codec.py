"""Bytes to typed messages and back, within limits. Nothing untyped passes here.

`msgpack` unpacks within declared bounds, `msgspec` checks every type and length.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import msgspec

from common.errors import InvalidRequest, TooLarge
from common.messages import AgentMessage, ControllerMessage, to_plain
from common.reports import Name, Record

MAX_MESSAGE = 1024 * 1024
MAX_ITEMS = 65536
MAX_DEPTH = 16


class _UnknownCommand(Record, frozen=True, tag="command"):
    id: Name


def encode(message: AgentMessage | ControllerMessage) -> bytes:
    """Pack a message. Raises TooLarge when it is over MAX_MESSAGE bytes."""
    packed: bytes = msgpack.packb(to_plain(message), use_bin_type=True)
    if len(packed) > MAX_MESSAGE:
        raise TooLarge(f"a message of {len(packed)} bytes is over the limit of {MAX_MESSAGE}")
    return packed


def decode_from_agent(packed: bytes) -> AgentMessage:
    """Unpack and check a message of an agent. Raises InvalidRequest or TooLarge."""
    return _convert(packed, AgentMessage)  # type: ignore[no-any-return]


def decode_from_controller(packed: bytes) -> ControllerMessage:
    """Unpack and check a message of the controller. Raises InvalidRequest or TooLarge."""
    return _convert(packed, ControllerMessage)  # type: ignore[no-any-return]


def _convert(packed: bytes, kind: Any) -> Any:
    if len(packed) > MAX_MESSAGE:
        raise TooLarge(f"a message of {len(packed)} bytes is over the limit of {MAX_MESSAGE}")
    try:
        plain = msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            max_str_len=65536,
            max_bin_len=0,
            max_ext_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )
        _check(plain, MAX_DEPTH)
        return msgspec.convert(plain, type=kind, strict=True)
    except (ValueError, TypeError, msgpack.UnpackException, msgspec.ValidationError, RecursionError) as error:
        raise InvalidRequest(f"malformed message: {str(error)[:200]}") from None


def _check(value: Any, levels: int) -> None:
    """Refuse what is nested deeper than so many levels, and floats that are no numbers."""
    if levels == 0:
        raise InvalidRequest("the message is nested too deep", allowed=f"at most {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for item in value.values():
            _check(item, levels - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, levels - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest("a number in the message is infinite or none at all")


def unknown_command_id(packed: bytes) -> str | None:
    """The id of a command whose arguments this version does not understand; None when it is no such thing."""
    try:
        return str(_convert(packed, _UnknownCommand).id)
    except (InvalidRequest, TooLarge):
        return None
