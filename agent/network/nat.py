"""Source NAT for what leaves the managed bridge: a table of our own in nftables, one rule where there is iptables only.

No rule of ours filters: a host whose own firewall drops forwarded packets must allow the bridge there.
"""

from __future__ import annotations

import logging
import shutil
from ipaddress import IPv4Network

from common.errors import DriverFailed
from common.process import run

log = logging.getLogger(__name__)
_TIMEOUT = 10.0


def table_name(bridge: str) -> str:
    """The name of the bridge's nftables table, and the comment of its iptables rule."""
    return f"vzfleet-{bridge}"


def ruleset(bridge: str, network: IPv4Network) -> str:
    """The nftables transaction that replaces our table as a whole (nft(8))."""
    table = table_name(bridge)
    return f"""
add table ip {table}
delete table ip {table}
table ip {table} {{
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname != "{bridge}" ip saddr {network} ip daddr != {network} counter masquerade
    }}
}}
"""


def _rule(bridge: str, network: IPv4Network) -> list[str]:
    match = ["-s", str(network), "!", "-d", str(network), "!", "-o", bridge]
    return [*match, "-m", "comment", "--comment", table_name(bridge), "-j", "MASQUERADE"]


async def ensure(bridge: str, network: IPv4Network) -> None:
    """Put the rules in place, in nftables where it works. Raises DriverFailed when nothing does."""
    if shutil.which("nft"):
        try:
            await run(["nft", "-f", "-"], timeout=_TIMEOUT, input=ruleset(bridge, network).encode())
        except DriverFailed as error:
            log.warning("nftables does not take the NAT rules", extra={"reason": error.text})
        else:
            return
    if not shutil.which("iptables"):
        raise DriverFailed("NAT needs nftables or iptables, and neither works on this node")
    rule = _rule(bridge, network)
    if (await _iptables("-C", rule)) != 0:
        await run(["iptables", "-w", "-t", "nat", "-A", "POSTROUTING", *rule], timeout=_TIMEOUT)


async def remove(bridge: str, network: IPv4Network) -> None:
    """Take the rules away. Absent is success. Raises DriverFailed."""
    table = ["table", "ip", table_name(bridge)]
    if shutil.which("nft") and (await run(["nft", "list", *table], timeout=_TIMEOUT, check=False)).code == 0:
        await run(["nft", "delete", *table], timeout=_TIMEOUT)
    rule = _rule(bridge, network)
    while shutil.which("iptables") and (await _iptables("-C", rule)) == 0:
        await run(["iptables", "-w", "-t", "nat", "-D", "POSTROUTING", *rule], timeout=_TIMEOUT)


async def _iptables(action: str, rule: list[str]) -> int:
    done = await run(["iptables", "-w", "-t", "nat", action, "POSTROUTING", *rule], timeout=_TIMEOUT, check=False)
    return done.code
