"""The network interfaces of a container, read from the kernel in the container's own network namespace.

A thread of its own enters the namespace for as long as it takes to open a socket there, and goes back at once: a
socket stays in the namespace that it was opened in. No other work ever runs on that thread, nothing of the container
is run or read as a file, and nothing is held afterwards that would keep a namespace alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from agent.metrics import netlink
from common.reports import Address, Interface

log = logging.getLogger(__name__)
MOST_INTERFACES = 64
MOST_ADDRESSES = 64
"""Of one interface: what a container adds beyond these is left out of its samples."""
_CLONE_NEWNET = 0x40000000
_SCOPES = {253: "link", 254: "local"}
_FAMILIES = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}
_MOST = 2**63 - 1
_libc = ctypes.CDLL(None, use_errno=True)


class InterfaceReader:
    """Reads interfaces of containers; `close` ends its thread."""

    def __init__(self) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network-namespaces")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
        os.close(self._home)

    def read(self, pid: int) -> tuple[Interface, ...]:
        """The interfaces of the network namespace of a container's init.

        Empty when the process is gone, or shares our own namespace, in which nothing is the container's.
        """
        return self._thread.submit(self._read, pid).result()

    def _read(self, pid: int) -> tuple[Interface, ...]:
        try:
            namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ()
        try:
            if os.fstat(namespace).st_ino == os.fstat(self._home).st_ino:
                return ()
            with self._socket_in(namespace) as route:
                ours = netlink.namespace_number(route, self._home)
                links = netlink.links(route)[:MOST_INTERFACES]
                addresses = netlink.addresses(route)
        except OSError as error:
            log.debug("a container's interfaces cannot be read", extra={"pid": pid, "reason": str(error)})
            return ()
        finally:
            os.close(namespace)
        return tuple(_interface(link, addresses, ours) for link in links)

    @contextlib.contextmanager
    def _socket_in(self, namespace: int) -> Iterator[socket.socket]:
        _enter(namespace)
        try:
            route = netlink.open_socket()
        finally:
            _enter(self._home)
        with route:
            yield route


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _interface(link: netlink.Link, addresses: list[netlink.LinkAddress], ours: int | None) -> Interface:
    counters = [min(counter, _MOST) for counter in link.counters]
    mine = [entry for entry in addresses if entry.index == link.index][:MOST_ADDRESSES]
    return Interface(
        name=link.name,
        hwaddr=link.hwaddr,
        mtu=link.mtu,
        up=link.up,
        host_name=_host_name(link, ours),
        addresses=tuple(_address(entry) for entry in mine),
        packets_received=counters[0],
        packets_sent=counters[1],
        bytes_received=counters[2],
        bytes_sent=counters[3],
        errors_received=counters[4],
        errors_sent=counters[5],
        dropped_received=counters[6],
        dropped_sent=counters[7],
    )


def _address(entry: netlink.LinkAddress) -> Address:
    return Address(
        family=_FAMILIES[entry.family],
        address=entry.address,
        netmask=str(entry.prefix),
        scope=_SCOPES.get(entry.scope, "global"),
    )


def _host_name(link: netlink.Link, ours: int | None) -> str | None:
    """The name of the other end, when it is in our own namespace: the container calls that one `ours`."""
    if link.peer is None or ours is None or link.peer_namespace != ours:
        return None
    try:
        return socket.if_indextoname(link.peer)
    except OSError:
        return None
