"""The network of a node's containers as the driver sees it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Collection
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.config import AgentConfig
from agent.network import bridge, nat, subnets
from agent.network.dhcp import Dnsmasq
from agent.network.leases import Reservations
from common.errors import DriverFailed, InvalidRequest

log = logging.getLogger(__name__)
# What the kernel takes as an interface's name, less what needs quoting anywhere (IFNAMSIZ, netdevice(7)).
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")


class NetworkState(Struct, frozen=True):
    """What `<state>/network.json` remembers: a subnet once chosen stays, and what is ours to remove."""

    bridge: str
    subnet: str


class Network:
    """A managed bridge, or one that the host has (`config.bridge`): then nothing is managed, and DHCP is the host's.

    The bridge, its NAT and dnsmasq outlive the agent, so that its restart touches no container.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.bridge = config.bridge or config.managed_bridge
        self.subnet: str | None = None
        self._managed = config.bridge is None
        self._wanted = config.subnet
        self._file = config.state / "network.json"
        self._directory = config.state / "dhcp"
        self._dhcp: Dnsmasq | None = None
        self._reservations: Reservations | None = None
        self._whole = True
        self._lock = asyncio.Lock()
        if not _INTERFACE.fullmatch(self.bridge):
            allowed = "1-15 of A-Z a-z 0-9 _ . -, beginning with a letter or digit"
            raise InvalidRequest(f"invalid bridge name {self.bridge[:80]!r}", field="bridge", allowed=allowed)

    async def open(self) -> None:
        """Make bridge, NAT and DHCP as far as they are not there. Idempotent.

        Raises DriverFailed when a tool fails or the bridge is another's, InvalidRequest for a subnet that is none,
        Conflict when no subnet is free.
        """
        async with self._lock:
            before = self._load()
            if before is not None and (not self._managed or before.bridge != self.bridge):
                await self._remove(before)  # the settings have changed: what was made for the old ones goes
                self._file.unlink()
                before = None
            if not self._managed:
                await bridge.require_present(self.bridge)
            elif self._dhcp is None:
                await self._open_managed(before)

    async def _open_managed(self, before: NetworkState | None) -> None:
        network = await self._choose_subnet(before.subnet if before is not None else None)
        gateway = _gateway(network)
        if before is None:
            await bridge.require_unused(self.bridge)
        # Remembered before anything is made: after a crash it is known to be ours.
        self._save(NetworkState(self.bridge, str(network)))
        new = not bridge.exists(self.bridge)
        await self._make_bridge(network)
        self._reservations = Reservations(self._directory, network)
        self._reservations.load()
        dhcp = Dnsmasq(self.bridge, gateway, self._directory)
        if new:
            await dhcp.stop()  # one that served a bridge removed by hand does not hear this one
        await dhcp.open()
        self._dhcp = dhcp
        self.subnet = str(network)

    async def _make_bridge(self, network: ipaddress.IPv4Network) -> None:
        await bridge.ensure(self.bridge, _gateway(network))
        bridge.enable_forwarding()
        await nat.ensure(self.bridge, network)

    async def repair(self) -> bool:
        """Make the managed bridge again, with DHCP and NAT, when it was removed by hand. True: it was missing.

        Whoever was connected to the old one has to be connected again. Costs one system call where all is well.
        Raises DriverFailed; the next call then tries again.
        """
        if not self._managed or (self._whole and bridge.exists(self.bridge)):
            return False
        async with self._lock:
            if self._whole and bridge.exists(self.bridge):
                return False
            _, dhcp = self._opened()
            log.warning("the bridge is missing and is made again", extra={"bridge": self.bridge})
            self._whole = False
            await self._make_bridge(dhcp.network)
            await dhcp.stop()  # it served the old bridge
            await dhcp.open()
            self._whole = True
            return True

    async def connect(self, interface: str) -> None:
        """Put the host's end of a container's cable into the bridge. One that has gone is success."""
        if bridge.exists(interface):
            await bridge.connect(self.bridge, interface)

    async def _choose_subnet(self, remembered: str | None) -> ipaddress.IPv4Network:
        if self._wanted is not None:
            return subnets.parse(self._wanted)
        if remembered is not None:
            return subnets.parse(remembered)
        return subnets.first_free(await subnets.taken(self.bridge))

    async def close(self) -> None:
        """Stop watching; bridge, NAT and dnsmasq stay."""
        if self._dhcp is not None:
            await self._dhcp.close()
            self._dhcp = None

    async def shut_down(self) -> None:
        """Remove dnsmasq, NAT and bridge; subnet and reservations stay remembered. Works on a closed network too.

        IPv4 forwarding stays as it is: others may have come to need it.
        """
        await self.close()
        state = self._load()
        if state is not None:
            await self._remove(state)
        self.subnet = None

    async def _remove(self, state: NetworkState) -> None:
        network = subnets.parse(state.subnet)
        await Dnsmasq(state.bridge, _gateway(network), self._directory).stop()
        await nat.remove(state.bridge, network)
        await bridge.remove(state.bridge)

    async def reserve(self, container: str, hwaddr: str, hostname: str) -> str | None:
        """Reserve an address for a network card (`00:16:3e:…`) and return it; the same card keeps it for life.

        `hostname` is also its DNS name, where DNS allows it. Idempotent. None where the bridge is not managed.
        Raises InvalidRequest for a bad `hwaddr`, Conflict when the subnet is full.
        """
        if not self._managed:
            return None
        async with self._lock:
            reservations, dhcp = self._opened()
            change = reservations.reserve(hwaddr, hostname)
            if change.evicted is not None:
                dhcp.release(*change.evicted)
            if change.replaced:
                dhcp.reload()
            log.debug("address reserved", extra={"container": container, "address": change.address})
            return change.address

    async def release(self, hwaddr: str) -> None:
        """Give an address back. Unknown is success. Raises InvalidRequest for a bad `hwaddr`."""
        if not self._managed:
            return
        async with self._lock:
            reservations, dhcp = self._opened()
            address = reservations.release(hwaddr)
            if address is not None:
                dhcp.reload()
                dhcp.release(hwaddr, address)

    async def keep_only(self, hwaddrs: Collection[str]) -> None:
        """Give back the addresses of all other cards: a crash before their containers were there left them."""
        if not self._managed:
            return
        for hwaddr in self._opened()[0].others(hwaddrs):
            log.warning("an address nobody uses is given back", extra={"hwaddr": hwaddr})
            await self.release(hwaddr)

    def _opened(self) -> tuple[Reservations, Dnsmasq]:
        if self._reservations is None or self._dhcp is None:
            raise RuntimeError("the network is not open")
        return self._reservations, self._dhcp

    def _load(self) -> NetworkState | None:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=NetworkState)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise DriverFailed(f"{self._file} is damaged: {error}") from error

    def _save(self, state: NetworkState) -> None:
        write_atomically(self._file, msgspec.json.encode(state))


def _gateway(network: ipaddress.IPv4Network) -> ipaddress.IPv4Interface:
    """The bridge's own address: the first of the network."""
    return ipaddress.IPv4Interface((network[1], network.prefixlen))


def write_atomically(file: Path, content: bytes) -> None:
    """Replace a file in one step; readable by all, as dnsmasq reads without root's rights."""
    staging = file.with_name(f".{file.name}.new")
    staging.write_bytes(content)
    staging.chmod(0o644)
    staging.replace(file)
