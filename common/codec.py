"""Bytes to typed messages and back, within limits. Nothing untyped passes here.

`msgpack` unpacks within declared bounds, `msgspec` checks every type and length.
"""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from common.errors import InvalidRequest, TooLarge
from common.messages import AgentMessage, ControllerMessage, to_plain

MAX_MESSAGE = 1024 * 1024
MAX_ITEMS = 65536
MAX_DEPTH = 16


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
        if _depth_over(plain, MAX_DEPTH):
            raise InvalidRequest("the message is nested too deep", allowed=f"at most {MAX_DEPTH} levels")
        return msgspec.convert(plain, type=kind, strict=True)
    except (ValueError, TypeError, msgpack.UnpackException, msgspec.ValidationError, RecursionError) as error:
        raise InvalidRequest(f"malformed message: {str(error)[:200]}") from None


def _depth_over(value: Any, left: int) -> bool:
    if left == 0:
        return True
    if isinstance(value, dict):
        return any(_depth_over(item, left - 1) for item in value.values())
    if isinstance(value, list):
        return any(_depth_over(item, left - 1) for item in value)
    return False
