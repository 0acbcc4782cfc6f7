"""The image `os: busybox`: a system container made from the host's busybox-static, in well under a second.

The archive depends on the busybox binary and on the recipe below only, so its fingerprint stays the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from common import process
from common.errors import DriverFailed, InvalidRequest
from controller.images.builder import FIELD, Builder, BuiltImage, ReportProgress, check_known, host_architecture
from controller.images.files import ImageFiles

MODIFIED = 1577836800
"""Time stamp of every file in the archive: 2020-01-01, in seconds since 1970."""
SIZE_LIMIT = 64 * 1024 * 1024
LISTING_TIMEOUT = 10.0
LATEST = "latest"
"""Another name of the one release that there is."""

# busybox's own init sleeps 2 s on its way down, and a script that it runs there cannot tell a reboot from a halt.
INIT = """\
#!/bin/sh
# Process 1. Its traps are what poweroff, halt, reboot and the host ask for; `wait` also reaps orphans.
end() {
    trap '' PWR USR1 USR2 TERM INT
    /etc/init.d/rc.shutdown
    exec "$1" -f
}
trap 'end poweroff' PWR USR1 USR2
trap 'end reboot' TERM INT
/etc/init.d/rc.start
while :; do
    /etc/init.d/rc.network &
    wait "$!"
    sleep 1 &
    wait "$!"
done
"""

START = """\
#!/bin/sh
mkdir -p /dev/shm
chmod 1777 /dev/shm
ip link set dev lo up
"""

NETWORK = """\
#!/bin/sh
# Keeps the DHCP client running; process 1 starts it again if it ends.
while [ ! -e /sys/class/net/eth0 ]; do
    sleep 10
done
exec udhcpc -f -i eth0 -t 5 -T 1 -A 3 -s /etc/udhcpc/default.script -x "hostname:$(hostname)"
"""

# kill -1 spares process 1 and the shell itself.
SHUTDOWN = """\
#!/bin/sh
others() {
    for entry in /proc/[0-9]*; do
        [ "$entry" = /proc/1 ] || [ "$entry" = "/proc/$$" ] || [ ! -e "$entry/exe" ] || return 0
    done
    return 1
}
kill -TERM -1
tries=0
while others && [ "$tries" -lt 100 ]; do
    usleep 20000
    tries=$((tries + 1))
done
sync
"""

DHCP_SCRIPT = """\
#!/bin/sh
# Called by udhcpc with what happened, and the lease in the environment.
case "$1" in
deconfig)
    ip -4 address flush dev "$interface"
    ip link set dev "$interface" up
    ;;
bound|renew)
    if ! ip -4 address show dev "$interface" | grep -qF " $ip/$mask "; then
        ip -4 address flush dev "$interface"
        ip -4 address add "$ip/$mask" broadcast + dev "$interface"
    fi
    for gateway in $router; do
        ip -4 route replace default via "$gateway" dev "$interface"
        break
    done
    {
        [ -z "$domain" ] || echo "search $domain"
        for server in $dns; do
            echo "nameserver $server"
        done
    } > /etc/resolv.conf.new
    mv /etc/resolv.conf.new /etc/resolv.conf
    ;;
esac
"""

PROFILE = "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
ACCOUNTS = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"
SHADOW = "root:*:18262:0:99999:7:::\nnobody:*:18262:0:99999:7:::\n"
GROUP = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"
HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"

DIRECTORIES: tuple[tuple[str, int], ...] = (
    *((name, 0o755) for name in ("bin", "dev", "etc", "etc/init.d", "etc/udhcpc", "home", "mnt", "proc", "run")),
    *((name, 0o755) for name in ("sbin", "sys", "usr", "usr/bin", "usr/sbin", "usr/local", "var", "var/log")),
    ("root", 0o700),
    ("tmp", 0o1777),
    ("var/tmp", 0o1777),
)
FILES: tuple[tuple[str, int, str], ...] = (
    ("sbin/init", 0o755, INIT),
    ("etc/init.d/rc.start", 0o755, START),
    ("etc/init.d/rc.network", 0o755, NETWORK),
    ("etc/init.d/rc.shutdown", 0o755, SHUTDOWN),
    ("etc/udhcpc/default.script", 0o755, DHCP_SCRIPT),
    ("etc/profile", 0o644, PROFILE),
    ("etc/passwd", 0o644, ACCOUNTS),
    ("etc/shadow", 0o640, SHADOW),
    ("etc/group", 0o644, GROUP),
    ("etc/hosts", 0o644, HOSTS),
)
LINKS: tuple[tuple[str, str], ...] = (("var/run", "../run"),)


class BusyboxBuilder(Builder):
    """Builds `os: busybox` from a static busybox (Debian's package busybox-static): its version is the one release."""

    os = "busybox"

    def __init__(self, program: Path = Path("/usr/bin/busybox")) -> None:
        self._program = program
        self._release: tuple[tuple[int, int], str] | None = None

    def check(self, properties: Mapping[str, str]) -> None:
        """Refuse unknown properties, other releases and other architectures. Raises DriverFailed without busybox."""
        check_known(properties)
        wanted = properties.get("release", LATEST)
        if wanted.lower() != LATEST and wanted != self.release():
            raise InvalidRequest(
                f"there is no release {wanted[:80]!r} of busybox here",
                field=f"{FIELD}.release",
                allowed=f"{self.release()} or {LATEST}",
            )

    def release(self) -> str:
        """The version of this host's busybox (`1.35.0`). Raises DriverFailed when there is none."""
        try:
            facts = self._program.stat()
            made = (facts.st_size, facts.st_mtime_ns)
            # Two megabytes are not read at every request.
            if self._release is None or self._release[0] != made:
                self._release = (made, _version(self._program.read_bytes()))
        except OSError as error:
            raise self._missing(error) from None
        return self._release[1]

    def key(self, properties: Mapping[str, str]) -> str:  # noqa: ARG002 - all checked properties mean the same image
        """Changes with the host's busybox and with the recipe. Raises DriverFailed when there is no busybox."""
        try:
            facts = self._program.stat()
        except OSError as error:
            raise self._missing(error) from None
        made_from = (facts.st_size, facts.st_mtime_ns, DIRECTORIES, FILES, LINKS)
        return f"busybox/{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}"

    async def build(self, properties: Mapping[str, str], files: ImageFiles, report: ReportProgress) -> BuiltImage:
        """Make the image. Raises DriverFailed when busybox is missing or not static, NoSpace."""
        self.check(properties)
        report("building", None)
        try:
            binary = await asyncio.to_thread(self._program.read_bytes)
        except OSError as error:
            raise self._missing(error) from None
        if b"/ld-linux" in binary or b"/ld-musl" in binary:
            raise DriverFailed(f"{self._program} is not static: install busybox-static")
        listing = await process.run([str(self._program), "--list-full"], timeout=LISTING_TIMEOUT)
        archive = await asyncio.to_thread(make_archive, binary, listing.output.split())
        staged = files.stage(SIZE_LIMIT)
        await staged.write(archive)
        await staged.finish()
        report("building", 100)
        version = _version(binary)
        described = {"description": f"BusyBox {version}", "os": self.os, "release": version}
        return BuiltImage(staged, "rootfs", described | {"architecture": host_architecture()})

    def _missing(self, error: OSError) -> DriverFailed:
        return DriverFailed(f"{self._program} cannot be read ({error.strerror}): install busybox-static")


def make_archive(binary: bytes, applets: list[str]) -> bytes:
    """A tar archive of the root file system; `applets` are paths below the root, such as `sbin/init`."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, mode in sorted(DIRECTORIES):
            archive.addfile(_entry(name, mode, tarfile.DIRTYPE))
        contents = [("bin/busybox", 0o755, binary), *((name, mode, text.encode()) for name, mode, text in FILES)]
        for name, mode, content in sorted(contents):
            entry = _entry(name, mode, tarfile.REGTYPE)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        files = {name for name, _, _ in contents}
        links = dict(LINKS) | {name: "/bin/busybox" for name in applets if name not in files}
        for name, target in sorted(links.items()):
            entry = _entry(name, 0o777, tarfile.SYMTYPE)
            entry.linkname = target
            archive.addfile(entry)
    return output.getvalue()


def _entry(name: str, mode: int, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mode, entry.type, entry.mtime = mode, kind, MODIFIED
    entry.uname = entry.gname = "root"
    return entry


def _version(binary: bytes) -> str:
    """The version that a busybox calls itself, "unknown" when it is not found."""
    start = binary.find(b"BusyBox v")
    word = binary[start + 9 : start + 40].split(b" ")[0] if start >= 0 else b""
    return word.decode("ascii", errors="replace") if word[:1].isdigit() else "unknown"
