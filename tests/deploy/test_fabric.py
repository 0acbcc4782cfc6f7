"""The network namespaces of `--nodes N`, made for real."""

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lib import addresses, fabric, plan
from deploy.lib.arguments import parse
from deploy.lib.state import Settings, State
from tests.leftovers import Machine

pytestmark = pytest.mark.lxc


@pytest.fixture
def place() -> State:
    return State(Path("/var/tmp") / f"vzq-{secrets.token_hex(4)}")


@pytest.fixture
def settings(place: State) -> Iterator[Settings]:
    decided = plan.decide(place, None, parse(["--state", str(place.root), "--nodes", "2"]), addresses.used())
    yield decided
    fabric.down(place, decided)
    assert place.tag not in str(Machine.now())
    assert place.tag not in output("nft", "list", "tables")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def uplink(place: State, settings: Settings, index: int) -> str:
    """The address of a node in the network between the nodes."""
    shown = output(*fabric.enter(place, settings.nodes[index]), "ip", "-4", "-brief", "address", "show", "uplink")
    return shown.split()[2].partition("/")[0]


def reaches(place: State, settings: Settings, index: int, address: str) -> bool:
    """Whether `address` answers a node: nothing listens there, and a refusal is an answer."""
    code = (
        "import socket, sys\n"
        "with socket.socket() as probe:\n"
        "    probe.settimeout(5)\n"
        "    sys.exit(probe.connect_ex((sys.argv[1], 9)) not in (0, 111))\n"  # ECONNREFUSED
    )
    command = [*fabric.enter(place, settings.nodes[index]), "/usr/bin/python3", "-c", code, address]
    return subprocess.run(command).returncode == 0


def test_nodes_reach_each_other_and_the_host(place: State, settings: Settings) -> None:
    fabric.up(place, settings)
    assert settings.fabric is not None
    assert reaches(place, settings, 0, uplink(place, settings, 1))
    assert reaches(place, settings, 1, addresses.hosts(settings.fabric)[0])
    primary = addresses.primary()
    assert primary is None or reaches(place, settings, 0, primary)


def test_up_again_changes_nothing_and_mends_what_is_gone(place: State, settings: Settings) -> None:
    fabric.up(place, settings)
    inode = (fabric.NAMESPACES / fabric.namespace(place, settings.nodes[0])).stat().st_ino
    rules = output("nft", "list", "table", "ip", f"vzfleet_fabric_{place.tag}")
    assert rules.count("masquerade") == 1
    fabric.up(place, settings)
    assert (fabric.NAMESPACES / fabric.namespace(place, settings.nodes[0])).stat().st_ino == inode
    assert output("nft", "list", "table", "ip", f"vzfleet_fabric_{place.tag}") == rules

    output("ip", "link", "delete", fabric.bridge(place))
    output("ip", "netns", "delete", fabric.namespace(place, settings.nodes[1]))
    fabric.up(place, settings)
    assert reaches(place, settings, 0, uplink(place, settings, 1))


def test_down_twice_is_fine(place: State, settings: Settings) -> None:
    fabric.up(place, settings)
    fabric.down(place, settings)
    assert fabric.enter(place, settings.nodes[0]) == []
    fabric.down(place, settings)
