"""A cable that loses and delays what goes through it, in place of netem: two taps in two namespaces and this process.

`wire.py HUB-NAMESPACE INTERFACE NODE-NAMESPACE INTERFACE`. It says `ready`, then reads a line of JSON for each change
(`delay` in seconds each way, `lost_to_node` and `lost_to_controller` as shares; all 0 when absent) and says `set`; it
ends with its input.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import sys
import time
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
LONGEST_FRAME = 65536


def tap(namespace: str, name: str) -> int:
    """A tap interface in a namespace; its packets are read from and written to the descriptor."""
    with Path(namespace).open("rb") as there:
        if ctypes.CDLL(None).setns(there.fileno(), CLONE_NEWNET) != 0:
            raise OSError(f"cannot enter {namespace}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


class Cable:
    """What is on its way, with the time at which it arrives."""

    def __init__(self, hub: int, node: int) -> None:
        self._other = {hub: node, node: hub}
        self._lost = {hub: 0.0, node: 0.0}
        self._hub = hub
        self._delay = 0.0
        self._flying: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()

    def set(self, delay: float = 0.0, lost_to_node: float = 0.0, lost_to_controller: float = 0.0) -> None:
        """Be like that from now on."""
        self._delay = delay
        self._lost = {end: lost_to_node if end == self._hub else lost_to_controller for end in self._other}

    def take(self, end: int) -> None:
        """Read what has come in at an end."""
        while True:
            try:
                frame = os.read(end, LONGEST_FRAME)
            except BlockingIOError:
                return
            if random.random() >= self._lost[end]:
                due = time.monotonic() + self._delay
                heapq.heappush(self._flying, (due, next(self._order), self._other[end], frame))

    def deliver(self) -> float | None:
        """Write what is due; the seconds until something is again."""
        while self._flying and self._flying[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(self._flying)
            try:
                os.write(end, frame)
            except OSError:
                continue  # the interface is down: the frame is lost
        return max(0.0, self._flying[0][0] - time.monotonic()) if self._flying else None


def main() -> None:
    hub, node = tap(sys.argv[1], sys.argv[2]), tap(sys.argv[3], sys.argv[4])
    cable = Cable(hub, node)
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([hub, node, sys.stdin], [], [], cable.deliver())
        for end in (hub, node):
            if end in readable:
                cable.take(end)
        if sys.stdin in readable:
            line = sys.stdin.readline()
            if not line:
                return
            cable.set(**json.loads(line))
            print("set", flush=True)


if __name__ == "__main__":
    main()
