"""Choosing the IPv4 network of a managed bridge."""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import IPv4Network, ip_network
from typing import Any

from common.errors import Conflict, InvalidRequest
from common.process import run

POOL = IPv4Network("10.88.0.0/16")
PREFIX = 24
_TIMEOUT = 10.0


def parse(text: str) -> IPv4Network:
    """A subnet such as `10.88.1.0/24`. Raises InvalidRequest."""
    allowed = "an IPv4 network of 8 to 65536 addresses, such as 10.88.1.0/24"
    try:
        network = ip_network(text)
    except ValueError as error:
        raise InvalidRequest(f"invalid subnet {text[:80]!r}: {error}", field="subnet", allowed=allowed) from None
    if not isinstance(network, IPv4Network) or not 16 <= network.prefixlen <= 29:
        raise InvalidRequest(f"invalid subnet {text[:80]!r}", field="subnet", allowed=allowed)
    return network


def first_free(used: Iterable[IPv4Network], pool: IPv4Network = POOL, prefix: int = PREFIX) -> IPv4Network:
    """The first network of the pool that overlaps with none in use. Raises Conflict when there is none."""
    networks = [network for network in used if network.prefixlen > 0]
    for candidate in pool.subnets(new_prefix=prefix):
        if not any(candidate.overlaps(network) for network in networks):
            return candidate
    raise Conflict(f"no free subnet in {pool}: set one")


async def taken(bridge: str) -> list[IPv4Network]:
    """The networks that this host has addresses in or routes to, other than over our own bridge."""
    addresses = json.loads((await run(["ip", "-j", "-4", "address", "show"], timeout=_TIMEOUT)).output or "[]")
    routes = json.loads((await run(["ip", "-j", "-4", "route", "show"], timeout=_TIMEOUT)).output or "[]")
    return in_use(addresses, routes, bridge)


def in_use(addresses: list[dict[str, Any]], routes: list[dict[str, Any]], bridge: str) -> list[IPv4Network]:
    """The networks in what `ip -j address` and `ip -j route` print."""
    texts = [
        f"{entry['local']}/{entry['prefixlen']}"
        for link in addresses
        if link.get("ifname") != bridge
        for entry in link.get("addr_info", ())
    ]
    texts += [route["dst"] for route in routes if route.get("dev") != bridge and route.get("dst") != "default"]
    return [IPv4Network(text, strict=False) for text in texts]
