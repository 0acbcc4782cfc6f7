"""Several nodes on one machine: a network namespace for each, joined by a bridge with a way out.

`python -m deploy.lib.fabric DIR` brings back what a reboot took away; a systemd unit does so.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from deploy.lib.addresses import hosts
from deploy.lib.console import DeployError, environment, run, succeeds
from deploy.lib.state import Node, Settings, State, load

NAMESPACES = Path("/run/netns")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def namespace(state: State, node: Node) -> str:
    """The name of a node's network namespace."""
    return f"vzfleet-{state.tag}-{node.name}"


def bridge(state: State) -> str:
    """The name of the bridge between the namespaces; an interface's name has 15 characters at most."""
    return f"vzfab-{state.tag}"


def enter(state: State, node: Node) -> list[str]:
    """What to put before a command so that it runs in a node's network; nothing for a node in the host's own.

    Not `ip netns exec`: that makes a mount namespace in which cgroups and later mounts are hidden.
    """
    if not node.namespace or not (NAMESPACES / namespace(state, node)).exists():
        return []
    return ["nsenter", f"--net={NAMESPACES / namespace(state, node)}", "--"]


def up(state: State, settings: Settings) -> None:
    """Make what is missing of bridge, namespaces, links, routes and NAT."""
    nodes = [node for node in settings.nodes if node.namespace]
    if not nodes or settings.fabric is None:
        return
    addresses = hosts(settings.fabric)
    _make_bridge(bridge(state), f"{addresses[0]}/24")
    FORWARDING.write_text("1\n")
    _make_nat(state, settings.fabric)
    for node in nodes:
        _join_namespace(state, node, address=f"{addresses[node.index]}/24", gateway=addresses[0])


def down(state: State, settings: Settings) -> None:
    """Remove all of it; what is not there is not missed. Forwarding stays on: others may rely on it by now."""
    for node in settings.nodes:
        # The link first: with its namespace it would vanish a moment later, by itself.
        if _exists(_link(state, node)):
            run(["ip", "link", "delete", _link(state, node)])
        if (NAMESPACES / namespace(state, node)).exists():
            run(["ip", "netns", "delete", namespace(state, node)])
    if _exists(bridge(state)):
        run(["ip", "link", "delete", bridge(state)])
    _drop_nat(state, settings.fabric)


def _make_bridge(name: str, address: str) -> None:
    if not _exists(name):
        run(["ip", "link", "add", name, "type", "bridge"])
    run(["ip", "address", "replace", address, "dev", name])
    run(["ip", "link", "set", name, "up"])


def _join_namespace(state: State, node: Node, *, address: str, gateway: str) -> None:
    name, link = namespace(state, node), _link(state, node)
    if not (NAMESPACES / name).exists():
        # What is left of a link into a namespace that has gone may just be vanishing.
        run(["ip", "link", "delete", link], check=False)
        run(["ip", "netns", "add", name])
    if not _exists(link):
        run(["ip", "link", "add", link, "type", "veth", "peer", "name", "uplink", "netns", name])
    run(["ip", "link", "set", link, "master", bridge(state), "up"])
    run(["ip", "-n", name, "link", "set", "lo", "up"])
    run(["ip", "-n", name, "address", "replace", address, "dev", "uplink"])
    run(["ip", "-n", name, "link", "set", "uplink", "up"])
    run(["ip", "-n", name, "route", "replace", "default", "via", gateway])


def _make_nat(state: State, network: str) -> None:
    if _has_nft():
        table = _table(state)
        if not succeeds(["nft", "list", "table", "ip", table]):
            chain = "{ type nat hook postrouting priority 100 ; }"
            rule = ["ip", "saddr", network, "ip", "daddr", "!=", network, "masquerade"]
            run(["nft", "add", "table", "ip", table])
            run(["nft", "add", "chain", "ip", table, "postrouting", chain])
            run(["nft", "add", "rule", "ip", table, "postrouting", *rule])
    for table, rule in _iptables_rules(state, network):
        if table == "filter" and "-P FORWARD ACCEPT" in run(["iptables", "-w", "-S", "FORWARD"]):
            continue
        if not succeeds(["iptables", "-w", "-t", table, "-C", *rule]):
            run(["iptables", "-w", "-t", table, "-I", *rule])


def _drop_nat(state: State, network: str | None) -> None:
    if _has_nft() and succeeds(["nft", "list", "table", "ip", _table(state)]):
        run(["nft", "delete", "table", "ip", _table(state)])
    for table, rule in _iptables_rules(state, network) if network else []:
        if succeeds(["iptables", "-w", "-t", table, "-C", *rule]):
            run(["iptables", "-w", "-t", table, "-D", *rule])


def _iptables_rules(state: State, network: str) -> list[tuple[str, list[str]]]:
    """Tables and rules: NAT where there is no nft; a way where something (Docker does) closed FORWARD."""
    if not shutil.which("iptables", path=environment()["PATH"]):
        return []
    marked = ["-m", "comment", "--comment", _table(state)]
    rules = [
        ("filter", ["FORWARD", "-i", bridge(state), *marked, "-j", "ACCEPT"]),
        ("filter", ["FORWARD", "-o", bridge(state), *marked, "-j", "ACCEPT"]),
    ]
    if not _has_nft():
        rules.append(("nat", ["POSTROUTING", "-s", network, "!", "-d", network, *marked, "-j", "MASQUERADE"]))
    return rules


def _table(state: State) -> str:
    return f"vzfleet_fabric_{state.tag}"


def _link(state: State, node: Node) -> str:
    return f"vzn-{state.tag}-{node.index}"


def _has_nft() -> bool:
    return shutil.which("nft", path=environment()["PATH"]) is not None


def _exists(interface: str) -> bool:
    return Path("/sys/class/net", interface).exists()


def main(arguments: list[str]) -> int:
    """Bring the network of the state directory up."""
    state = State(Path(arguments[0]))
    settings = load(state)
    if settings is None:
        raise DeployError(f"{state.root} holds no settings")
    up(state, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
