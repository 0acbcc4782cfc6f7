"""A network for a fleet on one machine: the controller in a namespace with a bridge, each agent in one of its own.

Nothing of it is in the machine's own namespace. The thread of the test moves into the controller's namespace, and with
it all that it starts; agents are started through `launcher`.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

CLONE_NEWNET = 0x40000000
ADDRESS = "10.99.0.1"
NAMESPACES = Path("/run/netns")
WIRE = Path(__file__).with_name("wire.py")
needed = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin") is None,
    reason="network namespaces need root and iproute2",
)


class Cable(Protocol):
    """What connects a node with the controller."""

    def set(self, **fault: float | bool) -> None:
        """Have a fault; without arguments have none."""
        ...

    def close(self) -> None: ...


def ip(*arguments: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Veth:
    """A real pair of interfaces; `set(down=True)` takes it down."""

    def __init__(self, hub: str, node: str, end: str) -> None:
        self._hub = hub
        self._end = end
        ip("-n", hub, "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", node)

    def set(self, *, down: bool = False, **_others: float | bool) -> None:
        """See Cable."""
        ip("-n", self._hub, "link", "set", self._end, "down" if down else "up")

    def close(self) -> None:
        """It goes with its namespaces."""


class Wire:
    """A pair of taps joined by a process of our own, which loses and delays packets (see wire.py).

    It stands in for netem, which not every kernel has. `set` takes `delay` (seconds, each way), `lost_to_node` and
    `lost_to_controller` (shares).
    """

    def __init__(self, hub: str, node: str, end: str) -> None:
        ends = [str(NAMESPACES / hub), end, str(NAMESPACES / node), "eth0"]
        self._process = subprocess.Popen(
            [sys.executable, str(WIRE), *ends], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._expect("ready")

    def set(self, **fault: float | bool) -> None:
        """See Cable."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fault) + "\n")
        self._process.stdin.flush()
        self._expect("set")

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        assert said == word, f"the wire said {said!r} instead of {word!r}"

    def close(self) -> None:
        """End its process."""
        self._process.communicate(timeout=10)


class Network:
    """The namespaces and cables of a fleet. `cables` are by node."""

    def __init__(self, nodes: int, cable: Callable[[str, str, str], Cable]) -> None:
        tag = f"vzt-{secrets.token_hex(3)}"
        self._hub = f"{tag}-hub"
        self._namespaces = {f"node{number}": f"{tag}-n{number}" for number in range(1, nodes + 1)}
        self._make_cable = cable
        self.cables: dict[str, Cable] = {}

    def up(self) -> None:
        """Make everything."""
        for name in (self._hub, *self._namespaces.values()):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self._hub, "link", "add", "br0", "type", "bridge")
        ip("-n", self._hub, "address", "add", f"{ADDRESS}/24", "dev", "br0")
        ip("-n", self._hub, "link", "set", "br0", "up")
        for number, (node, namespace) in enumerate(self._namespaces.items(), start=1):
            self.cables[node] = self._make_cable(self._hub, namespace, f"port{number}")
            ip("-n", self._hub, "link", "set", f"port{number}", "master", "br0", "up")
            ip("-n", namespace, "address", "add", f"10.99.0.{number + 1}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")

    def down(self) -> None:
        """Remove everything that was made."""
        for cable in self.cables.values():
            cable.close()
        for name in (self._hub, *self._namespaces.values()):
            if (NAMESPACES / name).exists():
                ip("netns", "del", name)

    def launcher(self, node: str) -> list[str]:
        """What stands before the command of a node's agent."""
        return ["nsenter", f"--net={NAMESPACES / self._namespaces[node]}", "--"]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in the controller's namespace within the block."""
        with Path("/proc/thread-self/ns/net").open("rb") as before, (NAMESPACES / self._hub).open("rb") as hub:
            _enter(hub.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def network(nodes: int, cable: Callable[[str, str, str], Cable] = Veth) -> Iterator[Network]:
    """A network with node1 … nodeN, in which the thread is within the block."""
    made = Network(nodes, cable)
    try:
        made.up()
        with made.entered():
            yield made
    finally:
        made.down()
