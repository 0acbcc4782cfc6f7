"""The managed network in a network namespace of its own: DHCP, DNS, NAT, restarts, and what is left afterwards."""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.lxc
ROOT = Path(__file__).resolve().parents[2]
BRIDGE = "vzfbr0"
AGENT = """
import asyncio, json, sys
from pathlib import Path
from agent.config import AgentConfig
from agent.network import Network
from common.errors import VzfleetError

async def main():
    settings = json.loads(sys.argv[1])
    network = Network(AgentConfig(**{**settings, "state": Path(settings["state"])}))
    while line := await asyncio.to_thread(sys.stdin.readline):
        method, *arguments = json.loads(line)
        try:
            answer = await getattr(network, method)(*arguments)
        except VzfleetError as error:
            answer = {"error": error.code, "text": error.text}
        print(json.dumps([answer, network.subnet]), flush=True)

asyncio.run(main())
"""
LEASE_SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip address flush dev $interface && ip address add $ip/$mask dev $interface && ip route replace default via $router
echo "$ip $router $dns $hostname"
"""


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Space:
    """A network namespace with a unique name."""

    def __init__(self) -> None:
        self.name = f"vzt-{secrets.token_hex(4)}"
        ip("netns", "add", self.name)
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", *arguments]

    def run(self, *arguments: str, **options: Any) -> str:
        done = subprocess.run(
            self.command(*arguments), check=True, capture_output=True, text=True, timeout=30, **options
        )
        return done.stdout

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]


class Agent:
    """A process in a namespace that carries out calls on a Network."""

    def __init__(self, space: Space, state: Path, path: str | None = None, **settings: Any) -> None:
        self.state = state
        config = json.dumps({"state": str(state), "node": "n1", "managed_bridge": BRIDGE, **settings})
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"PATH": path} if path else {})}
        nsenter = str(shutil.which("nsenter"))
        self.process = subprocess.Popen(
            [nsenter, *space.command(sys.executable, "-c", AGENT, config)[1:]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.subnet: str | None = None

    def call(self, *request: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], 30)[0], "no answer"
        answer, self.subnet = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        """End it the hard way, as kill -9 does."""
        self.process.kill()
        self.process.communicate()

    def dnsmasq(self) -> int:
        """Its pid; 0 while there is none (dnsmasq removes the file of another before it writes its own)."""
        file = self.state / "dhcp/dnsmasq.pid"
        text = file.read_text().strip() if file.exists() else ""
        return int(text or 0)


class Lab:
    """A node's namespace, its agents, and machines on its bridge; all of it removed at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir()
        self.state.chmod(0o711)
        self.agents: list[Agent] = []
        self.spaces: list[Space] = []
        self.node = self.space()

    def space(self) -> Space:
        self.spaces.append(Space())
        return self.spaces[-1]

    def agent(self, **options: Any) -> Agent:
        made = Agent(self.node, self.state, **options)
        self.agents.append(made)
        return made

    def machine(self, hwaddr: str) -> Space:
        """A namespace with a network card on the bridge."""
        made, end = self.space(), f"v{secrets.token_hex(4)}"
        self.node.run("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "address", hwaddr,
                      "netns", made.name)  # fmt: skip
        self.node.run("ip", "link", "set", end, "master", BRIDGE, "up")
        made.run("ip", "link", "set", "eth0", "up")
        return made

    def lease(self, machine: Space, *options: str) -> list[str]:
        """Ask for an address as a container does; [address, router, dns, hostname], or nothing."""
        script = self.directory / "lease"
        script.write_text(LEASE_SCRIPT)
        script.chmod(0o755)
        command = ["busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "5", "-T", "1", "-s", str(script)]
        done = subprocess.run(machine.command(*command, *options), capture_output=True, text=True, timeout=30)
        return done.stdout.split()

    def remove(self) -> None:
        for agent in self.agents:
            agent.end()
        left = [pid for space in self.spaces for pid in space.pids()]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for space in self.spaces:
            ip("netns", "delete", space.name)


@pytest.fixture
def lab() -> Iterator[Lab]:
    # Not below pytest's own directory: each session that starts closes that to others, dnsmasq among them.
    with tempfile.TemporaryDirectory(prefix="vzt-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        made = Lab(Path(directory))
        try:
            yield made
        finally:
            made.remove()


def wait_until(condition: Any, what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process runs; one that only waits for the machine's init to take note of its end does not."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


CARD = "00:16:3e:00:00:05"


def test_a_container_gets_its_reserved_address_and_name(lab: Lab) -> None:
    agent = lab.agent()
    assert agent.call("open") is None
    assert agent.subnet == "10.88.0.0/24"
    address = agent.call("reserve", "101", CARD, "web1")
    machine = lab.machine(CARD)
    begun = time.monotonic()
    assert lab.lease(machine) == [address, "10.88.0.1", "10.88.0.1", "web1"]
    assert time.monotonic() - begun < 2
    assert address in machine.run("busybox", "nslookup", "web1", "10.88.0.1")
    # The name changes with the hostname, the address does not.
    assert agent.call("reserve", "101", CARD, "_not_dns_") == address
    wait_until(lambda: lab.lease(machine)[3:] and lab.lease(machine)[3].startswith("ct-"), "the new name")


def test_strangers_get_no_address(lab: Lab) -> None:
    agent = lab.agent()
    agent.call("open")
    stranger = lab.machine("00:16:3e:ff:ff:ff")
    assert lab.lease(stranger, "-t", "2") == []


def test_nat_to_the_world(lab: Lab) -> None:
    agent = lab.agent(subnet="10.88.9.0/24")
    agent.call("open")
    agent.call("reserve", "101", CARD, "web1")
    world = lab.space()
    lab.node.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "down0", "netns", world.name)
    lab.node.run("ip", "address", "add", "192.0.2.2/24", "dev", "up0")
    lab.node.run("ip", "link", "set", "up0", "up")
    world.run("ip", "address", "add", "192.0.2.1/24", "dev", "down0")
    world.run("ip", "link", "set", "down0", "up")
    server = subprocess.Popen(
        world.command(sys.executable, "-c", "import socket as s; l = s.create_server(('192.0.2.1', 80)); "
                      "print('ready', flush=True); c, a = l.accept(); c.sendall(a[0].encode())"),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        machine = lab.machine(CARD)
        lab.lease(machine)
        # The world has no route to the container: it sees, and answers, the node's address.
        assert machine.run("busybox", "nc", "-w", "5", "192.0.2.1", "80", input="") == "192.0.2.2"
    assert "counter packets 1 " in lab.node.run("nft", "list", "table", "ip", f"vzfleet-{BRIDGE}")


def test_a_restarted_agent_touches_nothing(lab: Lab) -> None:
    first = lab.agent()
    first.call("open")
    address = first.call("reserve", "101", CARD, "web1")
    pid, before = first.dnsmasq(), json.loads(lab.node.run("ip", "-j", "link", "show", "dev", BRIDGE))
    first.end()
    second = lab.agent()
    second.call("open")
    second.call("open")
    assert second.subnet == first.subnet
    assert second.dnsmasq() == pid
    assert json.loads(lab.node.run("ip", "-j", "link", "show", "dev", BRIDGE))[0]["ifindex"] == before[0]["ifindex"]
    assert second.call("reserve", "101", CARD, "web1") == address
    second.call("close")
    assert runs(pid)
    assert lab.lease(lab.machine(CARD))[0] == address


def test_a_dnsmasq_that_dies_is_started_again(lab: Lab) -> None:
    agent = lab.agent()
    agent.call("open")
    address = agent.call("reserve", "101", CARD, "web1")
    pid = agent.dnsmasq()
    assert f"{BRIDGE}" in Path(f"/proc/{pid}/cmdline").read_text()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: agent.dnsmasq() not in (0, pid), "another dnsmasq")
    assert lab.lease(lab.machine(CARD))[0] == address


def test_a_bridge_removed_by_hand_is_back_with_its_dhcp(lab: Lab) -> None:
    agent = lab.agent()
    agent.call("open")
    address = agent.call("reserve", "101", CARD, "web1")
    lab.node.run("ip", "link", "delete", BRIDGE)
    agent.call("close")
    agent.call("open")
    assert lab.lease(lab.machine(CARD))[0] == address


def test_a_bridge_removed_by_hand_is_repaired_while_the_agent_runs(lab: Lab) -> None:
    agent = lab.agent()
    agent.call("open")
    address = agent.call("reserve", "101", CARD, "web1")
    before = agent.dnsmasq()
    assert agent.call("repair") is False, "nothing is missing"
    assert agent.dnsmasq() == before
    lab.node.run("ip", "link", "delete", BRIDGE)
    lab.node.run("nft", "flush", "ruleset")
    assert agent.call("repair") is True
    assert agent.subnet == "10.88.0.0/24"
    assert not runs(before) and agent.dnsmasq() != before
    assert "masquerade" in lab.node.run("nft", "list", "ruleset")
    assert lab.lease(lab.machine(CARD)) == [address, "10.88.0.1", "10.88.0.1", "web1"]
    assert agent.call("repair") is False


def test_a_repair_that_fails_is_tried_again(lab: Lab, tmp_path: Path) -> None:
    # Without dnsmasq's program the bridge is made, and its DHCP is not.
    directory = tmp_path / "bin"
    directory.mkdir()
    for program in ("ip", "nft", "dnsmasq"):
        (directory / program).symlink_to(str(shutil.which(program)))
    agent = lab.agent(path=str(directory))
    assert agent.call("open") is None
    address = agent.call("reserve", "101", CARD, "web1")
    lab.node.run("ip", "link", "delete", BRIDGE)
    (directory / "dnsmasq").unlink()
    assert agent.call("repair")["error"]
    assert agent.call("repair")["error"]
    (directory / "dnsmasq").symlink_to(str(shutil.which("dnsmasq")))
    assert agent.call("repair") is True
    assert lab.lease(lab.machine(CARD))[0] == address


def test_a_bridge_of_the_host_is_not_repaired(lab: Lab) -> None:
    lab.node.run("ip", "link", "add", "hostbr", "type", "bridge")
    agent = lab.agent(bridge="hostbr")
    assert agent.call("open") is None
    lab.node.run("ip", "link", "delete", "hostbr")
    assert agent.call("repair") is False
    assert "hostbr" not in lab.node.run("ip", "link")


def test_dnsmasq_gives_up_roots_rights_and_listens_on_the_bridge_alone(lab: Lab) -> None:
    agent = lab.agent()
    agent.call("open")
    status = Path(f"/proc/{agent.dnsmasq()}/status").read_text()
    assert "Uid:\t0\t" not in status
    listening = lab.node.run("ss", "-Hlntu").split("\n")
    local = {row.split()[4] for row in listening if row}
    assert local == {"10.88.0.1:53", f"0.0.0.0%{BRIDGE}:67"}


def test_shut_down_leaves_nothing(lab: Lab) -> None:
    agent = lab.agent()
    agent.call("open")
    agent.call("reserve", "101", CARD, "web1")
    pid = agent.dnsmasq()
    agent.end()
    last = lab.agent()
    assert last.call("shut_down") is None
    assert last.call("shut_down") is None
    last.end()
    assert not runs(pid)
    assert lab.node.pids() == []
    assert [row["ifname"] for row in json.loads(lab.node.run("ip", "-j", "link"))] == ["lo"]
    assert lab.node.run("nft", "list", "ruleset") == ""
    assert sorted(path.name for path in lab.state.rglob("*") if path.is_file()) == [
        CARD.replace(":", "-"), "leases", "network.json",
    ]  # fmt: skip


def test_a_pid_file_never_ends_a_stranger(lab: Lab) -> None:
    agent = lab.agent()
    agent.call("open")
    pid_file, pid = lab.state / "dhcp/dnsmasq.pid", agent.dnsmasq()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        agent.call("close")
        pid_file.write_text(f"{stranger.pid}\n")
        assert agent.call("shut_down") is None
        assert stranger.poll() is None
        stranger.kill()
    os.kill(pid, signal.SIGTERM)


def test_the_subnet_is_one_that_is_free(lab: Lab) -> None:
    lab.node.run("ip", "link", "add", "other0", "type", "bridge")
    lab.node.run("ip", "address", "add", "10.88.0.9/23", "dev", "other0")
    lab.node.run("ip", "link", "set", "other0", "up")
    lab.node.run("ip", "route", "add", "10.88.2.0/24", "dev", "other0")
    agent = lab.agent()
    agent.call("open")
    assert agent.subnet == "10.88.3.0/24"


def test_another_subnet_moves_bridge_and_reservations(lab: Lab) -> None:
    first = lab.agent()
    first.call("open")
    first.call("reserve", "101", CARD, "web1")
    first.end()
    second = lab.agent(subnet="10.99.0.0/24")
    assert second.call("open") is None
    address = second.call("reserve", "101", CARD, "web1")
    assert address.startswith("10.99.0.")
    assert lab.lease(lab.machine(CARD))[:2] == [address, "10.99.0.1"]
    shown = json.loads(lab.node.run("ip", "-j", "-4", "address", "show", "dev", BRIDGE))
    assert [entry["local"] for entry in shown[0]["addr_info"]] == ["10.99.0.1"]


def test_a_bridge_of_others_is_refused(lab: Lab) -> None:
    lab.node.run("ip", "link", "add", BRIDGE, "type", "bridge")
    lab.node.run("ip", "address", "add", "172.30.0.1/24", "dev", BRIDGE)
    answer = lab.agent().call("open")
    assert answer["error"] == "driver-failed"
    assert "in use with 172.30.0.1/24" in answer["text"]
    assert lab.node.run("nft", "list", "ruleset") == ""


def test_other_settings_leave_nothing_of_the_old_ones(lab: Lab) -> None:
    first = lab.agent()
    first.call("open")
    pid = first.dnsmasq()
    first.end()
    lab.node.run("ip", "link", "add", "own0", "type", "bridge")
    second = lab.agent(bridge="own0")
    assert second.call("open") is None
    assert second.subnet is None
    assert not runs(pid)
    assert lab.node.run("nft", "list", "ruleset") == ""
    assert [row["ifname"] for row in json.loads(lab.node.run("ip", "-j", "link"))] == ["lo", "own0"]


def test_an_interface_that_is_no_bridge_is_refused(lab: Lab) -> None:
    lab.node.run("ip", "link", "add", BRIDGE, "type", "veth", "peer", "name", "other0")
    assert "no bridge" in lab.agent().call("open")["text"]


def test_a_released_address_goes_to_the_next(lab: Lab) -> None:
    agent = lab.agent(subnet="10.88.5.0/29")
    agent.call("open")
    address = agent.call("reserve", "0", CARD, "old")
    for number in range(1, 5):
        agent.call("reserve", str(number), f"00:16:3e:00:01:{number:02x}", f"c{number}")
    assert agent.call("reserve", "5", "00:16:3e:00:02:01", "none")["error"] == "conflict"
    assert lab.lease(lab.machine(CARD))[0] == address
    assert agent.call("release", CARD) is None
    assert agent.call("release", CARD) is None
    leases = lab.state / "dhcp/leases"
    wait_until(lambda: CARD not in leases.read_text(), "the end of the old lease")
    assert agent.call("reserve", "6", "00:16:3e:00:02:02", "new") == address
    assert lab.lease(lab.machine("00:16:3e:00:02:02")) == [address, "10.88.5.1", "10.88.5.1", "new"]


def test_many_reservations_at_once(lab: Lab) -> None:
    agent = lab.agent()
    agent.call("open")
    begun = time.monotonic()
    given = {agent.call("reserve", str(n), f"00:16:3e:00:03:{n:02x}", f"c{n}") for n in range(100)}
    assert len(given) == 100
    assert time.monotonic() - begun < 2
    address = agent.call("reserve", "99", "00:16:3e:00:03:63", "c99")
    assert lab.lease(lab.machine("00:16:3e:00:03:63"))[0] == address


def test_iptables_where_nftables_is_missing(lab: Lab, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ip", "dnsmasq", "iptables"):
        (programs / name).symlink_to(str(shutil.which(name)))
    agent = lab.agent(path=str(programs))
    assert agent.call("open") is None
    agent.call("close")
    agent.call("open")
    rules = lab.node.run("iptables", "-t", "nat", "-S", "POSTROUTING").splitlines()
    assert len([rule for rule in rules if f"vzfleet-{BRIDGE}" in rule and "MASQUERADE" in rule]) == 1
    agent.call("shut_down")
    assert f"vzfleet-{BRIDGE}" not in lab.node.run("iptables", "-t", "nat", "-S", "POSTROUTING")


def test_no_container_becomes_the_hosts_router(lab: Lab) -> None:
    lab.agent().call("open")
    for setting in ("accept_ra", "autoconf"):
        assert lab.node.run("cat", f"/proc/sys/net/ipv6/conf/{BRIDGE}/{setting}").strip() == "0"
