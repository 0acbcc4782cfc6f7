"""What the API shows of containers, nodes, images and operations: from records and live state to JSON values."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import orjson
from msgspec import to_builtins

from common.clock import timestamp_of
from common.options import parse_config
from common.reports import ContainerReport, ContainerSample, Interface
from common.states import CONTAINER_STATES, Status
from common.units import format_percent, format_size
from controller.deviations import drift_of, drifted, unmanaged
from controller.fleet import Fleet
from controller.live import LiveContainer, LiveNode
from controller.records import Image, Operation, Snapshot
from controller.services.operations import Operations

RUNNING = (Status.RUNNING, Status.FROZEN)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else timestamp_of(seconds)


# ---------------------------------------------------------------- containers


def container_url(container: str) -> str:
    """Where a container is in the API."""
    return f"/1.0/vz/{container}"


def rendered(fleet: Fleet, live: LiveContainer, kind: str) -> bytes:
    """A container (`object`) or its state (`state`) as JSON; rendered once for every change."""
    found = live.rendered.get(kind)
    if found is None:
        view = container_view(fleet, live) if kind == "object" else state_view(fleet, live)
        found = live.rendered[kind] = orjson.dumps(view)
    return found


def container_view(fleet: Fleet, live: LiveContainer) -> dict[str, Any]:
    """GET /1.0/vz/<id>: the document's fields, and id, node, description, created_at, image."""
    record = live.record
    shown = fleet.status_of(live)
    status: dict[str, Any] = {
        "status": shown.status.text,
        "status_code": int(shown.status),
        "machine": [_machine(fleet, live)],
        "sampled_at": _time(live.sampled_at),
    }
    if shown.reason is not None:
        status["reason"] = shown.reason
    if shown.status is Status.ERROR and shown.last is not None:
        status["last_status"] = shown.last.text
    return {
        "id": record.id,
        "hostname": record.hostname,
        "node": record.node,
        "description": record.description,
        "config": record.config,
        "image": record.image,
        "created_at": record.created_at,
        "status": status,
        "drift": [to_builtins(one) for one in drift_of(fleet, live)],
    }


def _machine(fleet: Fleet, live: LiveContainer) -> dict[str, str | None]:
    figures = _figures(fleet, live)
    load = live.figures.cpu_load
    return {
        "disk_space": _size(figures["disk_space"]),
        "disk_usage": _size(figures["disk_usage"]),
        "memory": _size(figures["memory"]),
        "free_memory": _size(figures["free_memory"]),
        "cpu_load": None if load is None else format_percent(load),
        "ip_address": _address(live.figures),
    }


def _size(size: int | None) -> str | None:
    return None if size is None else format_size(size)


def _figures(fleet: Fleet, live: LiveContainer) -> dict[str, int | None]:
    """Bytes. The disk without a limit is the pool's, memory without a limit the node's; unknown is None."""
    node = fleet.nodes.get(live.record.node)
    facts = node.record.facts if node is not None else None
    settings = parse_config(live.record.config)
    sample = live.figures
    memory = sample.memory_limit or (settings.memory_bytes(facts.memory) or facts.memory if facts else settings.memory)
    free = None
    if memory is not None and sample.memory_usage is not None:
        used = sample.memory_usage - min(sample.memory_reclaimable or 0, sample.memory_usage)
        free = max(0, memory - used)
    return {
        "disk_space": sample.disk_limit or settings.disk or (facts.disk if facts else None),
        "disk_usage": sample.disk_usage,
        "memory": memory,
        "free_memory": free,
    }


def _address(sample: ContainerSample) -> str | None:
    """The first global address: IPv4 before IPv6."""
    found = [
        (address.family != "inet", position, address.address)
        for position, interface in enumerate(sample.interfaces)
        for address in interface.addresses
        if address.scope == "global"
    ]
    return min(found)[2] if found else None


def state_view(fleet: Fleet, live: LiveContainer) -> dict[str, Any]:
    """GET /1.0/vz/<id>/state: LXD's fields in plain numbers (bytes, nanoseconds, counters, every address)."""
    shown = fleet.status_of(live)
    sample = live.figures
    figures = _figures(fleet, live)
    view: dict[str, Any] = {
        "status": shown.status.text,
        "status_code": int(shown.status),
        "disk": {"root": {"usage": figures["disk_usage"], "total": figures["disk_space"]}},
        "memory": {
            "usage": sample.memory_usage,
            "usage_peak": sample.memory_peak,
            "total": figures["memory"],
            "free": figures["free_memory"],
            "reclaimable": sample.memory_reclaimable,
            "swap_usage": sample.swap_usage,
        },
        "cpu": {"usage": sample.cpu_time, "load": sample.cpu_load},
        "network": {interface.name: _interface(interface) for interface in sample.interfaces},
        "pid": sample.pid,
        "processes": sample.processes,
        "started_at": _time(sample.started_at),
        "sampled_at": _time(live.sampled_at),
    }
    if shown.reason is not None:
        view["reason"] = shown.reason
    if shown.status is Status.ERROR and shown.last is not None:
        view["last_status"] = shown.last.text
    return view


def _interface(interface: Interface) -> dict[str, Any]:
    return {
        "addresses": [
            {"family": a.family, "address": a.address, "netmask": a.netmask, "scope": a.scope}
            for a in interface.addresses
        ],
        "counters": {
            "bytes_received": interface.bytes_received,
            "bytes_sent": interface.bytes_sent,
            "packets_received": interface.packets_received,
            "packets_sent": interface.packets_sent,
            "errors_received": interface.errors_received,
            "errors_sent": interface.errors_sent,
            "packets_dropped_inbound": interface.dropped_received,
            "packets_dropped_outbound": interface.dropped_sent,
        },
        "hwaddr": interface.hwaddr,
        "host_name": interface.host_name,
        "mtu": interface.mtu,
        "state": "up" if interface.up else "down",
        "type": "loopback" if interface.name == "lo" else "broadcast",
    }


def snapshot_view(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot."""
    return {
        "name": snapshot.name,
        "container": snapshot.container,
        "created_at": snapshot.created_at,
        "config": snapshot.config,
        "expires_at": snapshot.expires_at,
        "scheduled": snapshot.scheduled,
        "stateful": False,
    }


# ---------------------------------------------------------------- nodes, images, operations


def node_view(fleet: Fleet, live: LiveNode) -> dict[str, Any]:
    """A node with its status, capacity (bytes) and load."""
    facts, sample = live.record.facts, live.sample
    records = [fleet.containers[container].record for container in live.containers]
    strangers = unmanaged(fleet, live)
    return {
        "name": live.record.name,
        "description": live.record.description,
        "status": str(live.shown),
        "message": live.message,
        "mode": str(live.record.mode),
        "fenced_at": live.record.fenced_at,
        "fenced_by": live.record.fenced_by,
        "since": live.since,
        "last_seen": live.last_seen,
        "clock_error": round(live.clock_error),
        "added_at": live.record.added_at,
        "architecture": facts.architecture if facts else None,
        "hostname": facts.hostname if facts else None,
        "kernel": facts.kernel if facts else None,
        "agent_version": facts.agent_version if facts else None,
        "driver": f"{facts.driver} {facts.driver_version}".strip() if facts else None,
        "storage": facts.storage if facts else None,
        "cgroup": facts.cgroup if facts else None,
        "subnet": facts.subnet if facts else None,
        "capacity": {
            "cpus": facts.cpus if facts else None,
            "memory": facts.memory if facts else None,
            "disk": facts.disk if facts else None,
            "reserved_memory": sum(record.reserved_memory for record in records),
            "reserved_disk": sum(record.reserved_disk for record in records),
        },
        "load": {
            "cpu_load": sample.cpu_load if sample else None,
            "load_average": list(sample.load_average) if sample else None,
            "memory_free": sample.memory_free if sample else None,
            "disk_free": sample.disk_free if sample else None,
            "uptime": sample.uptime if sample else None,
            "sampled_at": _time(live.sampled_at),
        },
        "containers": len(records),
        "drifted": drifted(fleet, live),
        "unmanaged": [report.id for report in strangers],
        "unmanaged_containers": [_unmanaged(report) for report in strangers],
        "online": live.reachable,
    }


def _unmanaged(report: ContainerReport) -> dict[str, Any]:
    """A container of nobody's; `own` is one that vzfleet has made."""
    status = Status(report.status) if report.status in CONTAINER_STATES else Status.ERROR
    own = report.generation > 0
    return {
        "id": report.id,
        "status": status.text,
        "format": "own" if own else "foreign",
        "generation": report.generation if own else None,
        "hostname": report.hostname or None,
    }


def image_view(image: Image) -> dict[str, Any]:
    """An image. `created_at` is when the controller got it; `last_used_at` is at most an hour too old."""
    origin = image.origin
    return {
        "fingerprint": image.fingerprint,
        "aliases": [{"name": alias, "description": image.descriptions.get(alias, "")} for alias in image.aliases],
        "properties": image.properties,
        "architecture": image.properties.get("architecture"),
        "layout": image.layout,
        "size": image.size,
        "filename": image.filename,
        "source": image.source or None,
        "created_at": image.created_at,
        "uploaded_at": image.created_at,
        "last_used_at": image.last_used_at,
        "expires_at": image.expires_at,
        "type": "container",
        "public": image.public,
        "cached": image.cached,
        "auto_update": image.auto_update,
        "update_source": None if origin is None else to_builtins(origin),
    }


def operation_view(operation: Operation, operations: Operations) -> dict[str, Any]:
    """LXD's operation object (R16), and kind, err_code, requestor, request, ended_at, and `duration` in seconds."""
    return {
        "id": operation.id,
        "class": "task",
        "kind": operation.kind,
        "description": operations.description(operation),
        "created_at": operation.created_at,
        "updated_at": operation.updated_at,
        "ended_at": operation.ended_at,
        "duration": _seconds(operation.created_at, operation.ended_at),
        "status": operation.status.text,
        "status_code": int(operation.status),
        "resources": operation.resources,
        "metadata": {**operation.metadata, **_results(operation)} or None,
        "may_cancel": operations.may_cancel(operation),
        "err": operation.error.text if operation.error else "",
        "err_code": operation.error.code if operation.error else "",
        "location": operation.node or "",
        "requestor": {
            "username": operation.requestor.username,
            "protocol": operation.requestor.protocol,
            "address": operation.requestor.address,
        },
        "request": operation.request,
    }


def _seconds(begin: str, end: str | None) -> float | None:
    """Seconds between two times; the wall clock may have been set back meanwhile."""
    if end is None:
        return None
    return max(0.0, round((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds(), 6))


def _results(operation: Operation) -> dict[str, Any]:
    return {
        key: value for output in operation.outputs.values() if isinstance(output, dict) for key, value in output.items()
    }
