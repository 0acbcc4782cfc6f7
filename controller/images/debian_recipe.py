"""What the image `os: debian` is made of.

A system container needs beyond the `minbase` packages: an init (systemd-sysv), D-Bus for `systemctl`, DHCP on eth0
(systemd-networkd and systemd-resolved, which need no udev), no traces of this host, and none of the units that cannot
work inside a user namespace.
"""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import tarfile
from collections.abc import Mapping
from pathlib import Path

from common.errors import InvalidRequest
from controller.images.builder import FIELD

DEFAULT_RELEASE = "bookworm"
NUMBERS = {"11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"}
WITH_UPDATES = ("bullseye", "bookworm", "trixie", "stable", "oldstable")
"""Releases that have `-updates` and `-security` suites of their own."""
RELEASES = (*WITH_UPDATES, "forky", "testing", "sid", "unstable")

PACKAGES = ("systemd-sysv", "systemd-resolved", "dbus", "iproute2", "iputils-ping", "netbase", "procps")
# In bullseye and before, systemd-resolved is a part of the package systemd.
PACKAGES_IN_SYSTEMD = {"bullseye": ("systemd-resolved",)}

# ClientIdentifier: the node's leases are reserved by hardware address. UseHostname: the container's own name stands.
NETWORK = """\
[Match]
Name=eth0

[Network]
DHCP=ipv4
LinkLocalAddressing=ipv6

[DHCPv4]
ClientIdentifier=mac
UseHostname=no
UseDomains=yes
"""
HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
FILES = {
    "etc/systemd/network/eth0.network": NETWORK,
    "etc/hosts": HOSTS,
    "etc/machine-id": "",  # Empty: each container makes its own at its first start (machine-id(5)).
}
# They fail in a user namespace, which makes the state "degraded", or are for machines with disks of their own.
MASKED = (
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-modules-load.service",
    "systemd-firstboot.service",
    "e2scrub_reap.service",
)
LINKS = {
    "etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf",
    **{f"etc/systemd/system/{unit}": "/dev/null" for unit in MASKED},
}
CLEAN = 'rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/etc/.resolv.conf.systemd-resolved.bak"'
"""Removes what mmdebstrap copied from this host. A hook's `$1` is the new root."""
ENABLE = 'chroot "$1" systemctl enable systemd-networkd.service systemd-resolved.service'


def suite(properties: Mapping[str, str]) -> str:
    """The archive's name of the wanted release. Raises InvalidRequest for one that Debian does not have."""
    wanted = properties.get("release", DEFAULT_RELEASE)
    name = NUMBERS.get(wanted, wanted.lower())
    if name not in RELEASES:
        raise InvalidRequest(
            f"Debian has no release {wanted[:80]!r}",
            field=f"{FIELD}.release",
            allowed=", ".join((*RELEASES, *NUMBERS)),
        )
    return name


def make_overlay() -> bytes:
    """The recipe's files and links as a tar archive, to be unpacked over the new root."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, text in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
        for name, target in LINKS.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return output.getvalue()


def make_command(release: str, overlay: Path, archives: tuple[str, str]) -> list[str]:
    """mmdebstrap's command line; it writes an uncompressed tar to standard output.

    As root it gets mount and pid namespaces of its own, so that nothing is left of it however it ends, and it dies
    with this process. Device nodes stay out of the image: a mapped root could not make them.
    """
    packages = [name for name in PACKAGES if name not in PACKAGES_IN_SYSTEMD.get(release, ())]
    main, security = archives
    sources = [f"deb {main} {release} main"]
    if release in WITH_UPDATES:
        sources += [f"deb {main} {release}-updates main", f"deb {security} {release}-security main"]
    hooks = [CLEAN, f"tar-in {shlex.quote(str(overlay))} /", ENABLE]
    contained = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    return [
        *("setpriv", "--pdeathsig", "KILL", "--", *(contained if os.geteuid() == 0 else [])),
        *("mmdebstrap", f"--mode={'root' if os.geteuid() == 0 else 'unshare'}"),
        *("--variant=minbase", "--format=tar", f"--include={','.join(packages)}"),
        "--skip=output/dev",
        *(f"--customize-hook={hook}" for hook in hooks),
        *("--", release, "-", *sources),
    ]


def recipe_hash() -> str:
    """Changes with all that is laid down here."""
    return hashlib.sha256(repr((PACKAGES, FILES, LINKS, CLEAN, ENABLE)).encode()).hexdigest()[:12]
