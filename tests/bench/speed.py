"""How fast is it: through REST from the request to the operation's Success, beside the bare commands, in one run.

    python tests/bench/speed.py /var/lib/vzfleet

Needs a running `deploy/quickstart` with one node, and `wrk` for the reads. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import ssl
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROUNDS = 15
STOP = {"action": "stop", "force": True}
SOURCE = {"type": "image", "properties": {"os": "busybox"}}
TARGETS = {"create": 25, "start": 40, "stop --force": 80, "delete": 20, "20 create+start": 600}


class Fleet:
    """The API of a running quickstart; every thread keeps a connection of its own."""

    def __init__(self, state: Path) -> None:
        lines = (line.partition("=") for line in (state / "env").read_text().splitlines() if "=" in line)
        self.env = {name: value for name, _, value in lines}
        self._context = ssl.create_default_context(cafile=self.env["VZFLEET_CACERT"])
        self._local = threading.local()
        self._threads = ThreadPoolExecutor(20)
        # Twenty connections are open before anything is measured.
        barrier = threading.Barrier(20)
        list(self._threads.map(lambda _: (self.request("GET", "/1.0"), barrier.wait()), range(20)))

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """A request; its envelope."""
        if not hasattr(self._local, "connection"):
            url = urlsplit(self.env["VZFLEET_URL"])
            self._local.connection = http.client.HTTPSConnection(url.hostname or "", url.port, context=self._context)
        headers = {"Authorization": f"Bearer {self.env['VZFLEET_TOKEN']}", "Content-Type": "application/json"}
        connection: http.client.HTTPSConnection = self._local.connection
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return json.loads(connection.getresponse().read())

    def done(self, method: str, path: str, body: Any = None) -> None:
        """An operation, to its Success."""
        answer = self.request(method, path, body)
        assert answer["type"] == "async", answer
        ended = self.request("GET", answer["operation"] + "/wait?timeout=100")
        assert ended["metadata"]["status"] == "Success", ended

    def all_at_once(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Twenty at a time."""
        list(self._threads.map(work, items))


def measured(work: Callable[[], None]) -> float:
    """Milliseconds that it takes."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def bare(*arguments: str) -> float:
    """Milliseconds of a command."""
    began = time.perf_counter()
    subprocess.run(arguments, check=True, capture_output=True)
    return (time.perf_counter() - began) * 1000


def through_rest(fleet: Fleet) -> dict[str, list[float]]:
    """One container through its life, again and again."""
    times: dict[str, list[float]] = {name: [] for name in TARGETS}
    url = "/1.0/vz/bench-1"
    for _ in range(ROUNDS):
        times["create"].append(measured(lambda: fleet.done("POST", url, {"source": SOURCE})))
        times["start"].append(measured(lambda: fleet.done("PUT", url + "/state", {"action": "start"})))
        times["stop --force"].append(measured(lambda: fleet.done("PUT", url + "/state", STOP)))
        times["delete"].append(measured(lambda: fleet.done("DELETE", url)))
    for _ in range(3):
        times["20 create+start"].append(measured(lambda: fleet.all_at_once(create_and_start(fleet), range(20))))
        fleet.all_at_once(lambda n: fleet.done("DELETE", f"/1.0/vz/many-{n}?force=1"), range(20))
    return times


def create_and_start(fleet: Fleet) -> Callable[[int], None]:
    """One of the twenty."""
    return lambda number: fleet.done("POST", f"/1.0/vz/many-{number}", {"source": SOURCE, "start": True})


def bare_commands(fleet: Fleet, state: Path) -> dict[str, list[float]]:
    """The same by btrfs and lxc-* alone, on a container of the fleet."""
    agent = state / "agents" / "node1"
    fleet.done("POST", "/1.0/vz/bench-bare", {"source": SOURCE})
    volume = agent / "pool" / "containers" / "bench-bare"
    copy = agent / "pool" / "bench-copy"
    name = ("-n", "bench-bare", "-P", str(agent / "lxc"))
    times: dict[str, list[float]] = {"create": [], "start": [], "stop --force": [], "delete": []}
    try:
        for _ in range(ROUNDS):
            times["create"].append(bare("btrfs", "subvolume", "snapshot", str(volume), str(copy)))
            times["start"].append(bare("lxc-start", *name, "-d"))
            times["stop --force"].append(bare("lxc-stop", *name, "-k"))
            times["delete"].append(bare("btrfs", "subvolume", "delete", str(copy)))
    finally:
        fleet.done("DELETE", "/1.0/vz/bench-bare?force=1")
    return times


def reads(fleet: Fleet) -> None:
    """Reads per second with 8 clients (wrk), of a list of 100 and of one container's state."""
    if shutil.which("wrk") is None:
        print("wrk is not installed: reads are not measured")
        return
    names = [f"/1.0/vz/list-{number:03}" for number in range(100)]
    fleet.all_at_once(lambda name: fleet.done("POST", name, {"source": SOURCE, "start": True}), names)
    try:
        for path in ("/1.0/vz?recursion=1", "/1.0/vz/list-000/state"):
            header = f"Authorization: Bearer {fleet.env['VZFLEET_TOKEN']}"
            command = ("wrk", "-t1", "-c8", "-d5", "--latency", "-H", header, fleet.env["VZFLEET_URL"] + path)
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            lines = [line.strip() for line in done.stdout.splitlines()]
            wanted = [line for line in lines if line.startswith(("Requests/sec", "99%"))]
            print(f"GET {path}: {'  '.join(wanted)}")
    finally:
        fleet.all_at_once(lambda name: fleet.done("DELETE", f"{name}?force=1"), names)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="the state directory of the quickstart")
    state = parser.parse_args().state
    fleet = Fleet(state)
    rest = through_rest(fleet)
    plain = bare_commands(fleet, state)
    print(f"{'ms, median (max)':20} {'REST':>16} {'bare':>8} {'ratio':>6} {'target':>7}")
    for name, times in rest.items():
        median = statistics.median(times)
        shown = f"{median:.1f} ({max(times):.1f})"
        base = statistics.median(plain[name]) if name in plain else None
        ratio = f"{median / base:.1f}" if base else ""
        print(f"{name:20} {shown:>16} {base or 0:>8.1f} {ratio:>6} {TARGETS[name]:>7}")
    reads(fleet)


if __name__ == "__main__":
    main()
