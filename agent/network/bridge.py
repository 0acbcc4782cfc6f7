"""The managed bridge, by iproute2's `ip`."""

from __future__ import annotations

import errno
import hashlib
import json
import socket
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

from common.errors import DriverFailed
from common.process import run

_TIMEOUT = 10.0
_SETTINGS = Path("/proc/sys/net")


async def require_unused(name: str) -> None:
    """Refuse a name that belongs to another interface, or to a bridge that others use. Raises DriverFailed."""
    if not exists(name):
        return
    if await _kind(name) != "bridge":
        raise DriverFailed(f"{name} exists and is no bridge: choose another name for the managed bridge")
    addresses = await _addresses(name)
    if addresses:
        raise DriverFailed(f"the bridge {name} is in use with {', '.join(addresses)}: choose another name")


async def require_present(name: str) -> None:
    """Refuse a name that no bridge of our network namespace has. Raises DriverFailed."""
    if not exists(name):
        raise DriverFailed(f"there is no bridge {name!r} on this node")
    if await _kind(name) != "bridge":
        raise DriverFailed(f"{name!r} is no bridge: containers cannot be connected to it")


async def _kind(name: str) -> str | None:
    link = (await _ip_json("-d", "link", "show", "dev", name))[0]
    kind: str | None = link.get("linkinfo", {}).get("info_kind")
    return kind


async def ensure(name: str, gateway: IPv4Interface) -> None:
    """Make our bridge with this address, or complete the one that is there. Raises DriverFailed."""
    if not exists(name):
        await _ip("link", "add", "dev", name, "address", hardware_address(name, gateway), "type", "bridge")
    present = await _addresses(name)
    if present != [str(gateway)]:
        await _ip("-4", "address", "flush", "dev", name)
        await _ip("address", "add", str(gateway), "broadcast", "+", "dev", name)
    refuse_router_advertisements(name)
    await _ip("link", "set", "dev", name, "up")


async def connect(name: str, interface: str) -> None:
    """Make an interface of ours a port of the bridge. Raises DriverFailed."""
    await _ip("link", "set", "dev", interface, "master", name, "up")


async def remove(name: str) -> None:
    """Remove the bridge. Absent is success."""
    if exists(name):
        await _ip("link", "delete", "dev", name)


def exists(name: str) -> bool:
    """Whether there is an interface of this name in our network namespace."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def hardware_address(name: str, gateway: IPv4Interface) -> str:
    """A locally administered address of the bridge's own: without one it takes that of a port, and changes with it."""
    digest = hashlib.sha256(f"{name} {gateway} {socket.gethostname()}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in b"\x02" + digest[:5])


def refuse_router_advertisements(name: str) -> None:
    """Let no container make itself the host's IPv6 router (the attack of CVE-2020-13401)."""
    for setting in ("accept_ra", "autoconf"):
        file = _SETTINGS / "ipv6/conf" / name / setting
        if file.exists():  # a kernel without IPv6 has nothing to refuse
            _write_setting(file, "0")


def enable_forwarding() -> None:
    """Let the host pass packets between the bridge and the world."""
    file = _SETTINGS / "ipv4/ip_forward"
    if file.read_text().strip() != "1":
        _write_setting(file, "1")


def _write_setting(file: Path, value: str) -> None:
    try:
        file.write_text(value)
    except OSError as error:
        if error.errno == errno.EROFS and file.read_text().strip() == value:
            return
        raise DriverFailed(f"{file} does not take {value!r}: {error.strerror}") from error


async def _ip(*arguments: str) -> str:
    return (await run(["ip", *arguments], timeout=_TIMEOUT)).output


async def _addresses(name: str) -> list[str]:
    shown = await _ip_json("-4", "address", "show", "dev", name)
    return [f"{entry['local']}/{entry['prefixlen']}" for row in shown for entry in row.get("addr_info", ())]


async def _ip_json(*arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(await _ip("-j", *arguments) or "[]")
    return [row for row in rows if row]
