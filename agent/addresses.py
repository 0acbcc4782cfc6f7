"""Where other nodes reach this one for a container's data."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from urllib.parse import urlsplit

from agent.config import AgentConfig
from common.errors import InvalidRequest

log = logging.getLogger(__name__)
ADDRESS_RULE = "a host name or an IP address"
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
# TEST-NET-1 (RFC 5737): nobody is there, so its route is the default route. A UDP socket that connects sends nothing.
_ELSEWHERE = ("192.0.2.1", 9)


def check_address(text: str, field: str = "address") -> str:
    """Return `text` if it names a host, else raise InvalidRequest."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not _HOST_NAME.fullmatch(text):
            raise InvalidRequest(f"invalid address {text[:100]!r}", field=field, allowed=ADDRESS_RULE) from None
    return text


async def transfer_address(config: AgentConfig) -> str | None:
    """`tcp://HOST:PORT` of this node's data port as others reach it; None when they cannot, or that is not known."""
    if not config.data_port:
        return None
    host = config.address or await asyncio.to_thread(_own_address, config.controller)
    if host is None:
        return None
    return f"tcp://[{host}]:{config.data_port}" if ":" in host else f"tcp://{host}:{config.data_port}"


def _own_address(controller: str) -> str | None:
    """This host's address on the way to the controller; where that is the same host, on the way to anywhere else."""
    parts = urlsplit(controller)
    try:
        own = _local_address(parts.hostname or "", parts.port or 0)
        if not ipaddress.ip_address(own).is_loopback:
            return own
    except (OSError, ValueError) as error:
        log.warning("this node's own address is not known", extra={"reason": str(error)})
        return None
    try:
        return _local_address(*_ELSEWHERE)
    except OSError:
        return own  # a host without a network: its nodes are all on it


def _local_address(host: str, port: int) -> str:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
