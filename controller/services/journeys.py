"""What must hold before a container's data travel to another node, and how fast they may."""

from __future__ import annotations

from common.errors import InvalidRequest, NoPlacement, Unsupported
from common.units import format_size, parse_size
from controller.live import LiveContainer, LiveNode
from controller.services.requests import Body, CopySource, CreateBody, MigrationSource, RenameBody

SLOWEST = 10_000
"""Bytes per second: with less nothing ever ends."""
_FOR: dict[str, tuple[type[Body], ...]] = {
    "bandwidth": (CopySource, MigrationSource),
    "timeout": (MigrationSource,),
    "force": (MigrationSource,),
}
"""By which fields of a create a journey is shaped, and with which sources there is one."""


def check_shape(body: CreateBody | RenameBody) -> None:
    """Raise InvalidRequest for a field that shapes a journey, where there is none."""
    for field, sources in _FOR.items():
        if getattr(body, field) in (None, False):
            continue
        if isinstance(body, RenameBody) and not body.migration:
            raise InvalidRequest(f"{field} is for moves", field=field, allowed="with migration: true")
        if isinstance(body, CreateBody) and not isinstance(body.source, sources):
            types = " or ".join(str(source.__struct_config__.tag) for source in sources)
            raise InvalidRequest(f"{field} is for other sources", field=field, allowed=f"with source.type {types}")


def rate_of(bandwidth: str | None, ceiling: int | None) -> int | None:
    """Bytes per second that a journey may take at most: what is asked for, below what the settings allow.

    Raises InvalidRequest.
    """
    if bandwidth is None:
        return ceiling
    rate = parse_size(bandwidth.removesuffix("/s"), "bandwidth")
    if rate < SLOWEST:
        allowed = f"at least {format_size(SLOWEST)} per second"
        raise InvalidRequest(f"a bandwidth of {bandwidth} is too little", field="bandwidth", allowed=allowed)
    return rate if ceiling is None else min(rate, ceiling)


def check_ends(source: LiveNode, target: LiveNode, live: LiveContainer, used: bool = True) -> None:
    """Raise Unsupported where an agent knows no transfers, NoPlacement where the files have no room at the target.

    `used`: what travels takes what the container uses now, by its last figures; what is not known is not refused.
    """
    for node in (source, target):
        facts = node.record.facts
        if facts is not None and "transfers" not in facts.capabilities:
            raise Unsupported(
                f"the agent of node {node.record.name} is too old for containers that travel: update it", field="node"
            )
    usage, load = live.figures.disk_usage, target.sample
    if used and usage is not None and load is not None and usage > load.disk_free:
        name, free = target.record.name, format_size(load.disk_free)
        reason = f"{free} of disk free, the files of {live.record.id} take {format_size(usage)}"
        raise NoPlacement(f"node {name} has no room: {reason}", field="node", details={"nodes": {name: reason}})
