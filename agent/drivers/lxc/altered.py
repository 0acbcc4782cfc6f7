"""Limits and configuration files that were changed by hand: found by comparing, told without being asked, never undone.

A running container's limits are what its cgroups and its quota say (`lxc-cgroup`, `btrfs qgroup limit` change them),
a stopped one's what stands in its `config`. Each start and each change writes both anew from the record.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.cgroups import Limits
from agent.drivers.lxc import config
from agent.drivers.lxc.host import Host
from agent.drivers.lxc.records import Record
from common.errors import VzfleetError
from common.options import Settings
from common.reports import Difference
from common.tasks import Tasks
from common.units import format_exactly

log = logging.getLogger(__name__)
TICK = 1.0
"""Seconds between two looks at the times of the configuration files."""
LIMITS_EVERY = 10
"""Ticks between two looks at the limits in force: each takes a handful of files of every running container."""
FILE = "lxc.config"
"""The key under which a configuration file that was removed is told."""
_PAGE = 4096
_MOST = 50
_LONGEST = 200
_LIMITS = {
    "memory.limit_in_bytes": "limits.memory",
    "memory.memsw.limit_in_bytes": "limits.memory",
    "memory.max": "limits.memory",
    "memory.swap.max": "limits.memory",
    "pids.max": "limits.processes",
    "cpuset.cpus": "limits.cpus",
    "cpu.cfs_period_us": "limits.cpu.allowance",
    "cpu.cfs_quota_us": "limits.cpu.allowance",
    "cpu.shares": "limits.cpu.allowance",
    "cpu.max": "limits.cpu.allowance",
    "cpu.weight": "limits.cpu.allowance",
}
# What differs with the host and not by hand.
_VARYING = ("lxc.apparmor.", "lxc.net.0.link", "lxc.net.0.script.up")

Stamp = tuple[int, int]


def limits(
    settings: Settings, pinned: tuple[int, ...], now: Limits, node_memory: int, all_cpus: Iterable[int], share: int
) -> dict[str, str | None]:
    """The limits in force that are not what the settings say, by key. None: none is in force.

    `pinned` are the CPUs chosen at the start, `share` is the cgroup's number for the soft share that is wanted.
    """
    found: dict[str, str | None] = {}
    memory = settings.memory_bytes(node_memory)
    if _pages(memory) != _pages(now.memory):
        found["limits.memory"] = None if now.memory is None else format_exactly(now.memory)
    if settings.processes != now.processes:
        found["limits.processes"] = None if now.processes is None else str(now.processes)
    if set(now.cpus or all_cpus) != set(pinned or all_cpus):
        found["limits.cpus"] = f"pinned to {','.join(str(cpu) for cpu in now.cpus)}"
    allowance = settings.allowance
    quota = None
    if allowance is not None and allowance.quota_us is not None and allowance.period_us is not None:
        quota = (allowance.quota_us, allowance.period_us)
    if quota != now.quota:
        found["limits.cpu.allowance"] = None if now.quota is None else f"{_ms(now.quota[0])}/{_ms(now.quota[1])}"
    elif quota is None and share != now.share:
        found["limits.cpu.allowance"] = f"share {now.share}"
    return found


def _pages(size: int | None) -> int | None:
    return None if size is None else size // _PAGE


def _ms(microseconds: int) -> str:
    return f"{microseconds / 1000:g}ms"


def lines(expected: config.Lines, found: config.Lines) -> list[Difference]:
    """What a configuration file has otherwise than it was written: limits by their keys, the rest by LXC's."""
    wanted, there = _stable(expected), _stable(found)
    differences: dict[str, Difference] = {}
    for name in sorted({key for key, _ in (wanted - there) | (there - wanted)}):
        option = _LIMITS.get(name.removeprefix("lxc.cgroup.").removeprefix("lxc.cgroup2."))
        key = option or name[:160]
        sides = (_values(wanted, name), _values(there, name))
        if option == "limits.memory":
            sides = (_size(sides[0]), _size(sides[1]))
        differences.setdefault(key, Difference(key, *sides))
    return list(differences.values())


def _stable(lines: config.Lines) -> Counter[tuple[str, str]]:
    entries = (line for line in lines if not line[0].startswith(_VARYING))
    # Those of lxcfs come and go with it.
    return Counter(line for line in entries if not line[1].startswith(str(config.LXCFS)))


def _values(lines: Counter[tuple[str, str]], name: str) -> str | None:
    values = sorted(value for key, value in lines.elements() if key == name)
    return "; ".join(values)[:_LONGEST] if values else None


def _size(text: str | None) -> str | None:
    return format_exactly(int(text)) if text is not None and text.isdecimal() else text


class Alterations:
    """Looks for what was changed by hand. `running` and `busy` say that of a container, `listener` is told its id."""

    def __init__(
        self, host: Host, running: Callable[[str], bool], busy: Callable[[str], bool], listener: Callable[[str], None]
    ) -> None:
        self._host = host
        self._running = running
        self._busy = busy
        self._listener = listener
        self._told: dict[str, tuple[Difference, ...]] = {}
        self._files: dict[str, tuple[Stamp | None, Record, list[Difference]]] = {}
        self._tasks = Tasks("alterations")

    def open(self) -> None:
        """From now on the listener hears of containers that are altered, or altered back."""
        self._tasks.start(self._look_around(), "look around")

    async def close(self) -> None:
        """Look no more."""
        await self._tasks.close()

    def find(self, record: Record) -> tuple[Difference, ...]:
        """What is altered of a container now."""
        container = record.spec.id
        found = {difference.key: difference for difference in self._in_file(record)}
        found.update((key, Difference(key, _own(record, key), now)) for key, now in self._in_force(record).items())
        differences = tuple(found.values())[:_MOST]
        self._told[container] = differences
        return differences

    def _in_force(self, record: Record) -> dict[str, str | None]:
        host, settings, container = self._host, record.settings, record.spec.id
        found: dict[str, str | None] = {}
        if self._running(container):
            cgroup = host.cgroup(container)
            now = cgroup.limits()
            if now is not None:
                share = cgroup.share_of(settings.allowance)
                found = limits(settings, record.cpus, now, host.memory, host.cgroups.cpus(), share)
        used, limit = host.storage.usage(f"containers/{container}")
        if host.storage.disk_limits and used is not None and limit != settings.disk:
            found["limits.disk"] = None if limit is None else format_exactly(limit)
        return found

    def _in_file(self, record: Record) -> list[Difference]:
        file = self._host.records.path(record.spec.id) / "config"
        stamp = _stamp(file)
        known = self._files.get(record.spec.id)
        if known is not None and known[0] == stamp and known[1] is record:
            return known[2]
        if stamp is None:
            found = [Difference(FILE, "present", "absent")] if file.parent.is_dir() else []
        else:
            found = [] if config.is_untouched(file) else self._compare(file, record)
        self._files[record.spec.id] = (stamp, record, found)
        return found

    def _compare(self, file: Path, record: Record) -> list[Difference]:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []  # it was removed meanwhile
        return lines(self._host.lines(record), config.parse(text))

    async def _look_around(self) -> None:
        for tick in itertools.count(1):
            await asyncio.sleep(TICK)
            records = self._host.records.all()
            for gone in self._told.keys() - records.keys():
                self._told.pop(gone)
                self._files.pop(gone, None)
            for container in records:
                if tick % LIMITS_EVERY == 0 or self._is_rewritten(container):
                    self._look_at(container)
                    await asyncio.sleep(0)

    def _is_rewritten(self, container: str) -> bool:
        known = self._files.get(container)
        return known is None or known[0] != _stamp(self._host.records.path(container) / "config")

    def _look_at(self, container: str) -> None:
        record = self._host.records.find(container)
        if record is None or self._busy(container):
            return
        told = self._told.get(container, ())
        try:
            if self.find(record) != told:
                self._listener(container)
        except (VzfleetError, OSError) as error:
            log.warning("a container cannot be compared", extra={"container": container, "reason": str(error)})


def _own(record: Record, key: str) -> str | None:
    return record.spec.config.get(key)


def _stamp(file: Path) -> Stamp | None:
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size
