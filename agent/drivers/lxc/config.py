"""The one writer of LXC's configuration files (lxc.container.conf(5)).

A line break in a value would be a line of its own, and some lines run programs as root (CVE-2026-23953): control
characters are refused here, and what was written is read back as LXC reads it before it counts.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from agent.cgroups import INNER
from common.errors import Internal, InvalidRequest
from common.names import has_control_characters
from common.options import Settings
from common.reports import ContainerSpec

Lines = list[tuple[str, str]]
LXCFS = Path("/var/lib/lxcfs")
_LXCFS_FILES = ("cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime")
# What /usr/share/lxc/config/common.conf allows a privileged container: null, zero, full, tty, console, ptmx, random,
# urandom, pts, fuse; and to make any node, but not to open it.
_DEVICES = (
    *("c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 5:0 rwm", "c 5:1 rwm", "c 5:2 rwm"),
    *("c 1:8 rwm", "c 1:9 rwm", "c 136:* rwm", "c 10:229 rwm"),
)
_DROPPED = "mac_admin mac_override sys_time sys_module sys_rawio"


@dataclass(frozen=True)
class Surroundings:
    """What a container's configuration needs to know of the node and of its start.

    `cgroup` is the node's directory (`vzfleet`), `version` of the cgroups `v1` or `v2`, `limits` their lines.
    """

    rootfs: Path
    cgroup: str
    version: str
    limits: tuple[tuple[str, str], ...]
    bridge: str
    attach: Path | None
    """The program that puts the cable into the bridge, where LXC cannot."""
    veth: str
    seccomp: Path
    apparmor: bool
    lxcfs: bool
    first_id: int
    id_count: int
    halt_signal: str


def lines_for(spec: ContainerSpec, settings: Settings, around: Surroundings) -> Lines:
    """A container's whole configuration."""
    return [
        ("lxc.uts.name", spec.hostname),
        ("lxc.rootfs.path", f"dir:{around.rootfs}"),
        ("lxc.signal.halt", around.halt_signal),
        ("lxc.tty.max", "4"),
        ("lxc.pty.max", "1024"),
        *_isolation(settings, around),
        *_mounts(settings, around),
        *_cgroups(spec.id, settings, around),
        *_network(spec, around),
        *(("lxc.environment", f"{name}={value}") for name, value in sorted(settings.environment.items())),
    ]


def _isolation(settings: Settings, around: Surroundings) -> Lines:
    lines: Lines = [("lxc.seccomp.profile", str(around.seccomp))]
    if around.apparmor:
        lines.append(("lxc.apparmor.profile", "generated"))
        lines.append(("lxc.apparmor.allow_nesting", "1" if settings.nesting else "0"))
        if not settings.privileged:
            # systemd shuts most of its services in mounts of their own; what those may be, the user namespace decides.
            lines += [("lxc.apparmor.raw", rule) for rule in ("mount,", "umount,", "pivot_root,")]
    if settings.privileged:
        return [*lines, ("lxc.cap.drop", _DROPPED)]
    mapping = f"0 {around.first_id} {around.id_count}"
    return [*lines, ("lxc.idmap", f"u {mapping}"), ("lxc.idmap", f"g {mapping}")]


def _mounts(settings: Settings, around: Surroundings) -> Lines:
    entries = ["/sys/fs/fuse/connections sys/fs/fuse/connections none bind,optional 0 0"]
    if settings.nesting:
        # As nesting.conf: an uncovered /proc and /sys, without which no further ones can be mounted inside.
        entries.append("proc dev/.lxc/proc proc create=dir,optional 0 0")
        entries.append("sys dev/.lxc/sys sysfs create=dir,optional 0 0")
    if around.lxcfs:
        entries += [f"{LXCFS}/proc/{name} proc/{name} none bind,optional 0 0" for name in _LXCFS_FILES]
        cpus = "sys/devices/system/cpu"
        entries.append(f"{LXCFS}/{cpus} {cpus} none rbind,optional 0 0")
    # With a writable /sys systemd-networkd waits for ever for a udev which no container has.
    automatic = ("lxc.mount.auto", "cgroup:mixed proc:mixed sys:mixed")
    return [automatic, *(("lxc.mount.entry", entry) for entry in entries)]


def _cgroups(container: str, settings: Settings, around: Surroundings) -> Lines:
    # The limits stand in an outer directory which the container cannot reach: it sees the inner one as its root.
    lines: Lines = [
        ("lxc.cgroup.dir.monitor", f"{around.cgroup}/.monitor/{container}"),
        ("lxc.cgroup.dir.monitor.pivot", f"{around.cgroup}/.pivot"),
        ("lxc.cgroup.dir.container", f"{around.cgroup}/{container}"),
        ("lxc.cgroup.dir.container.inner", INNER),
    ]
    if settings.privileged:
        prefix = "lxc.cgroup.devices" if around.version == "v1" else "lxc.cgroup2.devices"
        lines.append((f"{prefix}.deny", "a"))
        lines += [(f"{prefix}.allow", device) for device in _DEVICES]
    return [*lines, *around.limits]


def _network(spec: ContainerSpec, around: Surroundings) -> Lines:
    attach = ("lxc.net.0.link", around.bridge)
    if around.attach is not None:
        attach = ("lxc.net.0.script.up", str(around.attach))
    return [
        ("lxc.net.0.type", "veth"),
        attach,
        ("lxc.net.0.veth.pair", around.veth),
        ("lxc.net.0.name", "eth0"),
        ("lxc.net.0.hwaddr", spec.hwaddr),
        ("lxc.net.0.flags", "up"),
    ]


def render(lines: Lines) -> str:
    """The text of a configuration. Raises InvalidRequest for what cannot stand in one line."""
    for key, value in lines:
        if has_control_characters(key) or has_control_characters(value) or not key or "=" in key:
            raise InvalidRequest("a value cannot stand in one line of LXC's configuration", field=key[:80])
    # LXC takes one pair of quotes off, and white space only outside of them.
    text = "".join(f'{key} = "{value}"\n' for key, value in lines)
    if parse(text) != lines:
        raise Internal("LXC's configuration would not be read as it was written")
    return text


def parse(text: str) -> Lines:
    """Read a configuration as LXC's own parser does (src/lxc/confile.c, parse_line)."""
    lines: Lines = []
    for line in text.split("\n"):
        stripped = line.strip(" \t\r\f\v")
        if not stripped or stripped.startswith("#"):
            continue
        key, _, value = stripped.partition("=")
        value = value.strip(" \t\r\f\v")
        if len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]:
            value = value[1:-1]
        lines.append((key.strip(" \t\r\f\v"), value))
    return lines


def is_untouched(file: Path) -> bool:
    """Whether a configuration file is as `write` left it."""
    try:
        head, _, text = file.read_text(encoding="utf-8", errors="replace").partition("\n")
    except OSError:
        return False
    return head == _seal(text)


def _seal(text: str) -> str:
    return f"# written by vzfleet, and again at each start: {hashlib.sha256(text.encode()).hexdigest()}"


def write(file: Path, lines: Lines) -> None:
    """Replace a configuration file in one step. Raises InvalidRequest before anything is written."""
    text = render(lines)
    text = f"{_seal(text)}\n{text}"
    new = file.with_name(f".{file.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
    if parse(new.read_text(encoding="utf-8")) != lines:
        raise Internal(f"{new} does not hold what was written to it")
    new.replace(file)
