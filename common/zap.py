"""Answers to ZAP requests (ZeroMQ RFC 27): may this CURVE key connect. Without I/O, and it always answers.

pyzmq's authenticator is not used: one exception in its callback ends its task, after which every handshake hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

VERSION = b"1.0"
ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"agents"


def answer(request: Sequence[bytes], user_of: Callable[[bytes], str | None]) -> list[bytes]:
    """The reply frames to a request. `user_of` gives the User-Id of a raw public key of 32 bytes, None to refuse it.

    A request is version, request id, domain, address, routing id, mechanism and the mechanism's credentials.
    Anything but a known key by CURVE in our own domain is refused.
    """
    request_id = request[1] if len(request) > 1 else b""
    if len(request) != 7 or (request[0], request[2], request[5]) != (VERSION, DOMAIN, b"CURVE"):
        return [VERSION, request_id, b"400", b"not a CURVE request", b"", b""]
    user = user_of(request[6])
    if user is None:
        return [VERSION, request_id, b"400", b"unknown key", b"", b""]
    return [VERSION, request_id, b"200", b"OK", user.encode(), b""]
