"""What hand-made changes on a host made of a container: its row against what its node reports. Pure.

Nothing of it is ever undone by itself: the API shows it, and an operator decides which of the two is right.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from common.options import parse_config
from common.reports import ContainerReport
from common.states import Status
from controller.records import Container, Phase, Power

PRESENT, ABSENT = "present", "absent"
MOST = 100
"""Differences of a container that are shown: what its node says may be any number of them."""
_STATUS = {Power.RUNNING: Status.RUNNING, Power.STOPPED: Status.STOPPED, Power.FROZEN: Status.FROZEN}


class Drift(Struct, frozen=True):
    """One difference: a field as GET shows it (`status`, `config.limits.memory`), what it should be, and what it is.

    None: there is nothing of it. Also `existence`, `node` (it runs on another one), `snapshots.<name>`, and lines of
    LXC's own configuration (`lxc.uts.name`).
    """

    field: str
    expected: str | None
    found: str | None


def find(
    record: Container,
    report: ContainerReport | None,
    snapshots: Iterable[str] = (),
    elsewhere: str | None = None,
) -> tuple[Drift, ...]:
    """The differences of a container whose node can be reached.

    `snapshots` are the names of its rows, `elsewhere` is another node on which an older generation of it runs. None
    while an operation works on it, or when it is not whole.
    """
    if record.operation is not None or record.phase is not Phase.READY:
        return ()
    found = [Drift("node", record.node, elsewhere)] if elsewhere is not None else []
    if report is None:
        return (Drift("existence", PRESENT, ABSENT), *found)
    every = (*_status(record, report), *found, *_definition(record, report), *_snapshots(snapshots, report))
    return every[:MOST]


def _status(record: Container, report: ContainerReport) -> list[Drift]:
    """What it was left as by the last operation, unless it was started with its host as it should be."""
    if record.power is None:
        return []
    expected = _STATUS[record.power]
    by_boot = report.status == Status.RUNNING and parse_config(record.config).autostart
    if report.status == expected or (by_boot and expected is Status.STOPPED):
        return []
    return [Drift("status", expected.text, _text(report.status))]


def _text(status: int) -> str:
    try:
        return Status(status).text
    except ValueError:
        return Status.ERROR.text


def _definition(record: Container, report: ContainerReport) -> list[Drift]:
    """Hostname, configuration, and what is in force otherwise than its node was told."""
    found: dict[str, Drift] = {}
    if not report.bare:
        if report.hostname != record.hostname:
            found["hostname"] = Drift("hostname", record.hostname, report.hostname)
        for key in sorted(record.config.keys() | report.config.keys()):
            expected, there = record.config.get(key), report.config.get(key)
            if expected != there:
                found[f"config.{key}"] = Drift(f"config.{key}", expected, there)
    for altered in report.altered[:MOST]:
        own = altered.key.startswith("lxc.")
        field = altered.key if own else f"config.{altered.key}"
        expected = altered.expected if own else record.config.get(altered.key)
        found[field] = Drift(field, expected, altered.found)
    return list(found.values())


def _snapshots(names: Iterable[str], report: ContainerReport) -> list[Drift]:
    known, there = set(names), {snapshot.name for snapshot in report.snapshots}
    return [
        Drift(f"snapshots.{name}", *((PRESENT, ABSENT) if name in known else (ABSENT, PRESENT)))
        for name in sorted(known ^ there)
    ]
