"""How long is a moved container down: 1 GB of files, 5 MB/s written inside, from one real node to another and back.

    python tests/bench/moves.py [--size MB] [--moves N]

Makes a fleet of two nodes of its own (as root) and removes it. A program inside writes, and notes the time after each
write: the longest gap between two notes is what a user of the container felt, its own shutdown included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.real_fleet import BUSYBOX, RealFleet, real_fleet

CONTAINER = "bench"
WRITER = """#!/bin/sh
mkdir -p /root/beats
i=0
while :; do
    dd if=/dev/urandom of=/root/written.$(( i % 200 )) bs=512k count=1 2>/dev/null
    : >/root/beats/$$.$i
    i=$(( i + 1 ))
    sleep 0.09
done
"""
FILES = 64


def fill(root: Path, megabytes: int) -> None:
    """Files that do not compress, and the writer, which starts with the container."""
    owner = root.stat().st_uid
    home = root / "root"
    for number in range(FILES):
        with (home / f"file{number}").open("wb") as file:
            for _ in range(max(1, megabytes // FILES)):
                file.write(os.urandom(2**20))
    (home / "writer").write_text(WRITER)
    (home / "writer").chmod(0o755)
    with (root / "etc/init.d/rc.start").open("a") as start:
        start.write("/root/writer &\n")
    for path in home.iterdir():
        os.chown(path, owner, owner)


def longest_gap(fleet: RealFleet) -> float:
    """Seconds between the two notes that are furthest apart, by the times of their files: both nodes have one clock."""
    beats = sorted(path.stat().st_mtime for path in (fleet.root(CONTAINER) / "root/beats").iterdir())
    return max(later - earlier for earlier, later in pairwise(beats))


def move(fleet: RealFleet, node: str, **options: Any) -> dict[str, Any]:
    """One move, while the container writes; what the operation says and what was felt."""
    fleet.inside(CONTAINER, "rm -f /root/beats/*; sleep 2")
    begun = time.monotonic()
    ended = fleet.done("POST", f"/1.0/vz/{CONTAINER}", {"migration": True, "node": node, **options})
    took = time.monotonic() - begun
    fleet.inside(CONTAINER, "sleep 1")
    return {"took": took, "felt": longest_gap(fleet), **ended["metadata"]["downtime"], "via": ended["metadata"]["via"]}


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="megabytes of files (default %(default)s)")
    parser.add_argument("--moves", type=int, default=4, help="moves of each kind (default %(default)s)")
    options = parser.parse_args()
    with real_fleet(nodes=2) as fleet:
        fleet.done("POST", f"/1.0/vz/{CONTAINER}", {"source": BUSYBOX, "node": "node1"})
        fill(fleet.root(CONTAINER), options.size)
        fleet.state_of(CONTAINER, "start")
        for kind, body in (("asked to stop", {}), ("killed", {"force": True})):
            results = [move(fleet, f"node{2 - number % 2}", **body) for number in range(options.moves)]
            print(f"{kind}: via {results[0]['via']}")
            for name in ("took", "seconds", "stopping_seconds", "felt"):
                values = [result[name] for result in results]
                print(f"  {name:18} median {statistics.median(values):6.2f} s   worst {max(values):6.2f} s")
        fleet.delete(CONTAINER)


if __name__ == "__main__":
    main()
