"""Asking the kernel for a network namespace's interfaces and addresses: rtnetlink(7), the little of it that is needed.

What is inside a container's namespace is the container's own work: names, counts and sizes are hostile.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

# linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/net_namespace.h, linux/netlink.h
_GETLINK, _NEWLINK, _GETADDR, _NEWADDR, _NEWNSID, _GETNSID = 18, 16, 22, 20, 88, 90
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_STATS64, _IFLA_LINK_NETNSID = 1, 3, 4, 5, 23, 37
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_NETNSA_NSID, _NETNSA_FD = 1, 3
_IFF_UP = 1
_HEADER = struct.Struct("=LHHLL")
_LINK = struct.Struct("=BBHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_CHUNK = 65536
_MOST_BYTES = 512 * 1024
"""Of one answer: what a container adds beyond that is left out."""
_TIMEOUT = 1.0
_NETWORK_OF_OTHERS = -1


@dataclass(frozen=True, slots=True)
class Link:
    """An interface; `peer` is the index of its other end, in the namespace that ours calls `peer_namespace`."""

    index: int
    name: str
    hwaddr: str
    mtu: int
    up: bool
    peer: int | None
    peer_namespace: int | None
    counters: tuple[int, ...]
    """rtnl_link_stats64's first eight: packets, bytes, errors and dropped, received before sent in each."""


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An address of the interface `index`; `scope` as in rtnetlink(7): 0 universe, 253 link, 254 host."""

    index: int
    family: socket.AddressFamily
    address: str
    prefix: int
    scope: int


def open_socket() -> socket.socket:
    """A route socket of the calling thread's network namespace; it stays there."""
    route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    route.settimeout(_TIMEOUT)
    return route


def links(route: socket.socket) -> list[Link]:
    """All interfaces. Raises OSError when the kernel refuses or does not answer."""
    found = []
    for kind, body in _ask(route, _GETLINK, _DUMP, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0)):
        if kind == _NEWLINK and len(body) >= _LINK.size:
            found.append(_link(body))
    return found


def addresses(route: socket.socket) -> list[LinkAddress]:
    """All IPv4 and IPv6 addresses. Raises OSError when the kernel refuses or does not answer."""
    found = []
    for kind, body in _ask(route, _GETADDR, _DUMP, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        address = _address(body) if kind == _NEWADDR and len(body) >= _ADDRESS.size else None
        if address is not None:
            found.append(address)
    return found


def namespace_number(route: socket.socket, descriptor: int) -> int | None:
    """What the socket's namespace calls the one of `descriptor` (a `/proc/<pid>/ns/net`); None: it has no name for it.

    Raises OSError when the kernel refuses or does not answer.
    """
    request = bytes(4) + _ATTRIBUTE.pack(8, _NETNSA_FD) + struct.pack("=I", descriptor)
    for kind, body in _ask(route, _GETNSID, 0, request):
        if kind == _NEWNSID:
            number = dict(_attributes(body[4:])).get(_NETNSA_NSID)
            value = _integer(number, signed=True)
            return value if value != _NETWORK_OF_OTHERS else None
    return None


def _ask(route: socket.socket, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
    route.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0) + body)
    received = 0
    while received < _MOST_BYTES:
        data = route.recv(_CHUNK)
        received += len(data)
        at = 0
        while at + _HEADER.size <= len(data):
            length, answer, _flags, _sequence, _port = _HEADER.unpack_from(data, at)
            content = data[at + _HEADER.size : at + length]
            if answer == _DONE or length < _HEADER.size:
                return
            if answer == _ERROR:
                number = -struct.unpack_from("=i", content)[0]
                raise OSError(number, "netlink refuses")
            yield answer, content
            at += (length + 3) & ~3
        if not flags & _DUMP:
            return


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _link(body: bytes) -> Link:
    _family, _pad, _type, index, flags, _change = _LINK.unpack_from(body)
    found = dict(_attributes(body[_LINK.size :]))
    statistics = found.get(_IFLA_STATS64, b"")
    return Link(
        index=index,
        name=_name(found.get(_IFLA_IFNAME, b"")),
        hwaddr=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=_integer(found.get(_IFLA_MTU)) or 0,
        up=bool(flags & _IFF_UP),
        peer=_integer(found.get(_IFLA_LINK)),
        peer_namespace=_integer(found.get(_IFLA_LINK_NETNSID), signed=True),
        counters=struct.unpack_from("=8Q", statistics) if len(statistics) >= 64 else (0,) * 8,
    )


def _address(body: bytes) -> LinkAddress | None:
    family, prefix, _flags, scope, index = _ADDRESS.unpack_from(body)
    found = dict(_attributes(body[_ADDRESS.size :]))
    # Of a point-to-point link IFA_ADDRESS is the other end's.
    packed = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    sizes = {socket.AF_INET: 4, socket.AF_INET6: 16}
    if packed is None or sizes.get(family) != len(packed):
        return None
    known = socket.AddressFamily(family)
    return LinkAddress(index, known, socket.inet_ntop(known, packed), prefix, scope)


def _name(raw: bytes) -> str:
    """An interface's name; a container may put any bytes there but white space, `/` and `:`."""
    text = raw.rstrip(b"\0").decode("ascii", "replace")
    return "".join(mark if mark.isascii() and mark.isprintable() else "?" for mark in text)


def _integer(raw: bytes | None, *, signed: bool = False) -> int | None:
    return int.from_bytes(raw, sys.byteorder, signed=signed) if raw else None
