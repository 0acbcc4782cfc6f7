"""IPv4 addresses of this machine, and networks that nothing here uses yet."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Iterable, Iterator

from deploy.lib.console import run

FABRIC_POOL = ipaddress.IPv4Network("10.87.0.0/16")
CONTAINER_POOL = ipaddress.IPv4Network("10.88.0.0/16")


def primary() -> str | None:
    """The address by which others reach this machine; None when it has no way out. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # RFC 5737: an address that nobody has
        except OSError:
            return None
        return str(probe.getsockname()[0])


def used() -> list[ipaddress.IPv4Network]:
    """The networks that this machine has routes to, but for the default route."""
    routes = json.loads(run(["ip", "-json", "-4", "route", "show", "table", "all"]) or "[]")
    found = (ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"][0].isdigit())
    return [network for network in found if network.prefixlen > 0]


def free(pool: ipaddress.IPv4Network, start: int, taken: Iterable[ipaddress.IPv4Network]) -> Iterator[str]:
    """The /24 networks of `pool` that overlap nothing in `taken`, beginning with number `start` and going round."""
    busy = list(taken)
    networks = list(pool.subnets(new_prefix=24))
    first = start % len(networks)
    for network in networks[first:] + networks[:first]:
        if not any(network.overlaps(other) for other in busy):
            yield str(network)


def hosts(network: str) -> list[str]:
    """The addresses of a network that hosts may have: the first is the gateway's here."""
    return [str(address) for address in ipaddress.IPv4Network(network).hosts()]
