"""How long do snapshots, restores and copies take: with 1 MB in the container, and with 1 GB in 20,000 files and one.

    python tests/bench/snapshots.py [--size MB] [--rounds N]

Makes a fleet of one node of its own (as root, on btrfs) and removes it. Times are of whole operations through REST.
`down by a restore` is from the request until the first program in the restored container has written again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.real_fleet import BUSYBOX, RealFleet, real_fleet, until

MIB = 2**20
PROGRAM = """#!/bin/sh
echo up >/root/started
"""


def fill(root: Path, megabytes: int, files: int) -> None:
    """Data, files, and a program that starts with the container and writes then; on disk when this returns."""
    owner, home = root.stat().st_uid, root / "root"
    with (home / "data").open("wb") as data:
        for _ in range(megabytes):
            data.write(os.urandom(MIB))
    for number in range(files):
        directory = home / f"files{number // 1000}"
        directory.mkdir(exist_ok=True)
        (directory / str(number)).write_text("x" * 100)
    (home / "program").write_text(PROGRAM)
    (home / "program").chmod(0o755)
    with (root / "etc/init.d/rc.start").open("a") as start:
        start.write("/root/program\n")
    for path in (home, *home.rglob("*")):
        os.chown(path, owner, owner)
    subprocess.run(["sync", "-f", str(root)], check=True)


def took(fleet: RealFleet, method: str, path: str, body: Any = None) -> float:
    """Milliseconds of an operation, to its end."""
    begun = time.monotonic()
    fleet.done(method, path, body)
    return (time.monotonic() - begun) * 1000


def started_after(fleet: RealFleet, container: str, moment: float) -> float:
    """When the program inside wrote, later than `moment` (seconds since 1970 by the host's clock)."""
    file = fleet.root(container) / "root" / "started"
    return float(until(lambda: file.exists() and file.stat().st_mtime > moment and file.stat().st_mtime, "it writes"))


def down(fleet: RealFleet, container: str) -> float:
    """Milliseconds from a restore's request until the program inside has written again."""
    begun = time.time()
    fleet.done("PUT", f"/1.0/vz/{container}", {"restore": "steady"})
    return (started_after(fleet, container, begun) - begun) * 1000


def measure(fleet: RealFleet, container: str, rounds: int) -> dict[str, list[float]]:
    """All kinds of work on one container."""
    url = f"/1.0/vz/{container}"
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        name, copy = f"s{number}", f"{container}-copy{number}"
        times["snapshot"].append(took(fleet, "POST", f"{url}/snapshots", {"name": name}))
        times["restore, stopped"].append(took(fleet, "PUT", url, {"restore": name}))
        times["copy, same node"].append(
            took(fleet, "POST", f"/1.0/vz/{copy}", {"source": {"type": "copy", "source": f"{container}/{name}"}})
        )
        times["rename snapshot"].append(took(fleet, "POST", f"{url}/snapshots/{name}", {"name": f"{name}-old"}))
        times["delete snapshot"].append(took(fleet, "DELETE", f"{url}/snapshots/{name}-old"))
        fleet.delete(copy)
    fleet.state_of(container, "start")
    started_after(fleet, container, 0)
    fleet.done("POST", f"{url}/snapshots", {"name": "steady"})
    for number in range(rounds):
        times["snapshot, running"].append(took(fleet, "POST", f"{url}/snapshots", {"name": f"r{number}"}))
        begun = time.monotonic()
        times["down by a restore"].append(down(fleet, container))
        times["restore, running"].append((time.monotonic() - begun) * 1000)
    fleet.state_of(container, "stop", force=True)
    return times


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="megabytes in the big one (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is done (default %(default)s)")
    options = parser.parse_args()
    with real_fleet(nodes=1) as fleet:
        results = {}
        for name, megabytes, files in (("small", 1, 0), ("big", options.size, 20_000)):
            fleet.done("POST", f"/1.0/vz/{name}", {"source": BUSYBOX})
            fill(fleet.root(name), megabytes, files)
            results[name] = measure(fleet, name, options.rounds)
        print(f"{'ms, median (worst)':20} {'1 MB':>16} {f'{options.size} MB':>16}")
        for kind in results["small"]:
            shown = [f"{statistics.median(each[kind]):.0f} ({max(each[kind]):.0f})" for each in results.values()]
            print(f"{kind:20} {shown[0]:>16} {shown[1]:>16}")
        fleet.delete("small", "big")


if __name__ == "__main__":
    main()
