"""dnsmasq on the managed bridge: started as a daemon that outlives the agent, watched, told of changes, stopped.

With systemd, the agent's unit must leave it alone when the agent stops (`KillMode=process`).
"""

from __future__ import annotations

import asyncio
import logging
import pwd
import secrets
import signal
import socket
import stat
import struct
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

from agent.network import daemon
from common.errors import DriverFailed, VzfleetError
from common.process import run
from common.tasks import Tasks

log = logging.getLogger(__name__)
LEASE_TIME = "1h"
_START_TIMEOUT = 10.0
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 30.0


class Dnsmasq:
    """DHCP and DNS on one bridge, for reserved network cards only; its files are in `directory`."""

    def __init__(self, bridge: str, gateway: IPv4Interface, directory: Path) -> None:
        self._bridge = bridge
        self._gateway = gateway
        self._directory = directory
        self._pid_file = directory / "dnsmasq.pid"
        self._tasks = Tasks("dhcp")

    @property
    def network(self) -> IPv4Network:
        """The network whose addresses it gives away."""
        return self._gateway.network

    def arguments(self) -> list[str]:
        """The command (dnsmasq(8)); nothing comes from the host's dnsmasq.conf or /etc/hosts."""
        network = self._gateway.network
        return [
            "dnsmasq",
            "--conf-file=/dev/null",
            f"--user={unprivileged_user()}",
            f"--pid-file={self._pid_file}",
            # Bound to the bridge alone, also when it is made anew; other DHCP servers of the host go on.
            "--bind-dynamic",
            f"--interface={self._bridge}",
            "--except-interface=lo",
            "--no-hosts",
            "--domain-needed",
            "--bogus-priv",
            "--dns-loop-detect",
            # Reserved cards only: nobody uses up the subnet with invented addresses.
            f"--dhcp-range={network.network_address},static,{network.netmask},{LEASE_TIME}",
            f"--dhcp-hostsdir={self._directory / 'hosts'}",
            f"--dhcp-leasefile={self._directory / 'leases'}",
            f"--dhcp-lease-max={network.num_addresses}",
            "--dhcp-authoritative",
            "--dhcp-no-override",
            "--no-ping",
            "--quiet-dhcp",
        ]

    async def open(self) -> None:
        """Take over the dnsmasq that runs already, or start one, and see that one runs from now on.

        Raises DriverFailed when it cannot be started.
        """
        require_passable(self._directory)
        await self._ensure_running()
        self._tasks.start(self._supervise(), "supervise")

    async def close(self) -> None:
        """Stop watching; dnsmasq goes on."""
        await self._tasks.close()

    async def stop(self) -> None:
        """Stop watching, then end dnsmasq. Absent is success."""
        await self.close()
        await self._end_running()
        self._pid_file.unlink(missing_ok=True)

    def reload(self) -> None:
        """Let it read all reservations again; one that does not run reads them when it starts."""
        with daemon.running(self._pid_file, self.arguments()) as process:
            if process is not None:
                daemon.send(process, signal.SIGHUP)

    def release(self, hwaddr: str, address: str) -> None:
        """End the lease of a card that is gone, so that its address can be given away (DHCPRELEASE, RFC 2131)."""
        server = str(self._gateway.ip)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            try:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._bridge.encode())
                sender.sendto(release_packet(hwaddr, address, server), (server, 67))
            except OSError as error:
                # It is sent again when the address is needed, and the lease ends by itself within an hour.
                log.warning("a lease was not released", extra={"address": address, "reason": error.strerror})

    async def _ensure_running(self) -> None:
        if daemon.is_current(self._pid_file, self.arguments()):
            return
        await self._end_running()
        await run(self.arguments(), timeout=_START_TIMEOUT)

    async def _end_running(self) -> None:
        with daemon.running(self._pid_file, self.arguments()) as process:
            if process is not None:
                await daemon.terminate(process)

    async def _supervise(self) -> None:
        clock = asyncio.get_running_loop().time
        pause = _FIRST_PAUSE
        while True:
            begun = clock()
            try:
                await self._ensure_running()
            except VzfleetError as error:
                log.error("dnsmasq does not start", extra={"bridge": self._bridge, "reason": error.text})
            with daemon.running(self._pid_file, self.arguments()) as process:
                if process is not None:
                    await daemon.ended(process)
                    log.warning("dnsmasq ended and is started again", extra={"bridge": self._bridge})
            # What dies again and again is not started in a busy loop.
            pause = _FIRST_PAUSE if clock() - begun > _LONGEST_PAUSE else min(pause * 2, _LONGEST_PAUSE)
            await asyncio.sleep(pause)


def unprivileged_user() -> str:
    """The user that dnsmasq becomes: Debian's own, else nobody."""
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "dnsmasq" if "dnsmasq" in known else "nobody"


def require_passable(directory: Path) -> None:
    """Refuse a directory that dnsmasq could not reach without root's rights. Raises DriverFailed naming the reason."""
    for parent in (directory, *directory.resolve().parents):
        if not parent.stat().st_mode & stat.S_IXOTH:
            raise DriverFailed(f"{parent} lets nobody but its owner pass: give it search permission (chmod o+x)")


def release_packet(hwaddr: str, address: str, server: str) -> bytes:
    """A DHCPRELEASE of a card's address (RFC 2131, sections 2 and 4.4.6)."""
    head = struct.pack("!BBBB4sHH", 1, 1, 6, 0, secrets.token_bytes(4), 0, 0)
    addresses = socket.inet_aton(address) + bytes(12)
    card = bytes.fromhex(hwaddr.replace(":", "")).ljust(16, b"\0")
    options = b"\x63\x82\x53\x63" + b"\x35\x01\x07" + b"\x36\x04" + socket.inet_aton(server) + b"\xff"
    return (head + addresses + card + bytes(192) + options).ljust(300, b"\0")
