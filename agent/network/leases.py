"""Which network card has which address: one small file a card, which dnsmasq reads (`--dhcp-hostsdir`).

The files are the record; nothing else remembers a reservation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from pathlib import Path

from common.errors import Conflict, InvalidRequest
from common.names import dns_label

HWADDR = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@dataclass(frozen=True)
class Reservation:
    """An address and a DNS name of a network card."""

    hwaddr: str
    address: IPv4Address
    name: str

    def line(self) -> str:
        """The line of `--dhcp-host` (dnsmasq(8))."""
        return f"{self.hwaddr},{self.address},{self.name}\n"


@dataclass(frozen=True)
class Change:
    """What a reservation led to.

    `replaced`: a file that dnsmasq may have read has changed, so that it must be told. `evicted`: (hwaddr, address)
    of a lease on the same address which a card that is gone has left.
    """

    address: str
    replaced: bool = False
    evicted: tuple[str, str] | None = None


class Reservations:
    """The reservations of one subnet, in `<directory>/hosts`; dnsmasq's leases are in `<directory>/leases`."""

    def __init__(self, directory: Path, network: IPv4Network) -> None:
        self._hosts = directory / "hosts"
        self._leases = directory / "leases"
        self._network = network
        self._by_hwaddr: dict[str, Reservation] = {}
        self._used: set[IPv4Address] = set()

    def load(self) -> None:
        """Read the files; what is of another subnet gets an address of this one, what is damaged is removed."""
        self._hosts.mkdir(parents=True, exist_ok=True)
        for directory in (self._hosts.parent, self._hosts):
            directory.chmod(0o755)  # dnsmasq reads without root's rights
        moved: list[Reservation] = []
        for file in sorted(self._hosts.iterdir()):
            found = _parse(file.read_text(errors="replace"))
            if found is None or file != self._file(found.hwaddr):
                file.unlink()
            elif found.address in self._network and found.address not in self._used:
                self._remember(found)
            else:
                moved.append(found)
        for old in moved:
            self._write(Reservation(old.hwaddr, self._free_address(old.hwaddr), old.name))

    def reserve(self, hwaddr: str, hostname: str) -> Change:
        """Give a card its address. Raises InvalidRequest for a bad `hwaddr`, Conflict when the subnet is full."""
        name = dns_label(hostname)
        before = self._by_hwaddr.get(check_hwaddr(hwaddr))
        if before is not None:
            if before.name != name:
                self._write(Reservation(hwaddr, before.address, name))
            return Change(str(before.address), replaced=before.name != name)
        address = self._free_address(hwaddr)
        holder = self._leased().get(address)
        evicted = (holder, str(address)) if holder is not None and holder != hwaddr else None
        self._write(Reservation(hwaddr, address, name))
        # dnsmasq notices a new file by itself; a HUP re-reads them all.
        return Change(str(address), evicted=evicted)

    def release(self, hwaddr: str) -> str | None:
        """Forget a card and return the address it had; None when it had none."""
        before = self._by_hwaddr.pop(check_hwaddr(hwaddr), None)
        if before is None:
            return None
        self._used.discard(before.address)
        self._file(hwaddr).unlink(missing_ok=True)
        return str(before.address)

    def others(self, hwaddrs: Collection[str]) -> list[str]:
        """The cards with a reservation which are not among these."""
        return sorted(self._by_hwaddr.keys() - set(hwaddrs))

    def _free_address(self, hwaddr: str) -> IPv4Address:
        # Beginning where the card's hash says gives it the same address again, and leaves freed ones alone for long.
        first, size = int(self._network.network_address), self._network.num_addresses
        start = int.from_bytes(hashlib.sha256(hwaddr.encode()).digest()[:8], "big")
        for step in range(size):
            offset = (start + step) % size
            address = IPv4Address(first + offset)
            # The first is the network's, the second the bridge's, the last is broadcast.
            if 2 <= offset < size - 1 and address not in self._used:
                return address
        raise Conflict(f"the subnet {self._network} has no free address left")

    def _leased(self) -> dict[IPv4Address, str]:
        """dnsmasq's leases: `expiry hwaddr address name client-id` a line."""
        try:
            rows = [line.split() for line in self._leases.read_text(errors="replace").splitlines()]
        except FileNotFoundError:
            return {}
        rows = [row for row in rows if len(row) >= 4 and HWADDR.fullmatch(row[1])]
        return {IPv4Address(row[2]): row[1] for row in rows}

    def _remember(self, reservation: Reservation) -> None:
        self._by_hwaddr[reservation.hwaddr] = reservation
        self._used.add(reservation.address)

    def _write(self, reservation: Reservation) -> None:
        file = self._file(reservation.hwaddr)
        staging = file.with_name(f".{file.name}")  # dnsmasq leaves names with a dot alone
        staging.write_text(reservation.line())
        staging.chmod(0o644)
        staging.replace(file)
        self._remember(reservation)

    def _file(self, hwaddr: str) -> Path:
        return self._hosts / hwaddr.replace(":", "-")


def check_hwaddr(hwaddr: str) -> str:
    """Return a network card's address as it stands in files, else raise InvalidRequest."""
    if not HWADDR.fullmatch(hwaddr):
        allowed = "six bytes in lower-case hexadecimal, such as 00:16:3e:01:02:03"
        raise InvalidRequest(f"invalid hardware address {hwaddr[:80]!r}", field="hwaddr", allowed=allowed)
    return hwaddr


def _parse(text: str) -> Reservation | None:
    parts = text.strip().split(",")
    if len(parts) != 3 or not HWADDR.fullmatch(parts[0]) or dns_label(parts[2]) != parts[2]:
        return None
    try:
        return Reservation(parts[0], IPv4Address(parts[1]), parts[2])
    except AddressValueError:
        return None
