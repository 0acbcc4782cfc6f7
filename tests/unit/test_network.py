"""The network's decisions without a network: subnets, reservations, NAT rules, packets, what is refused."""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.network import Network, nat, subnets
from agent.network.dhcp import Dnsmasq, release_packet, require_passable
from agent.network.leases import Reservations
from common.errors import Conflict, DriverFailed, InvalidRequest
from common.names import dns_label

SMALL = IPv4Network("10.88.7.0/29")


def card(number: int) -> str:
    return f"00:16:3e:00:00:{number:02x}"


@pytest.fixture
def reservations(tmp_path: Path) -> Reservations:
    found = Reservations(tmp_path, SMALL)
    found.load()
    return found


def test_the_first_free_subnet() -> None:
    used = [
        IPv4Network(text) for text in ("0.0.0.0/0", "10.88.0.0/24", "10.88.1.64/30", "10.88.2.0/23", "192.0.2.0/24")
    ]
    assert subnets.first_free([]) == IPv4Network("10.88.0.0/24")
    assert subnets.first_free(used) == IPv4Network("10.88.4.0/24")
    with pytest.raises(Conflict, match="no free subnet"):
        subnets.first_free([IPv4Network("10.0.0.0/8")])


def test_networks_in_use_without_our_own() -> None:
    addresses = [
        {"ifname": "eth0", "addr_info": [{"local": "10.88.3.7", "prefixlen": 24}]},
        {"ifname": "ours", "addr_info": [{"local": "10.88.0.1", "prefixlen": 24}]},
        {"ifname": "none"},
    ]
    routes = [
        {"dst": "default", "dev": "eth0"},
        {"dst": "10.88.0.0/24", "dev": "ours"},
        {"dst": "10.88.9.9", "dev": "w"},
    ]
    assert subnets.in_use(addresses, routes, "ours") == [IPv4Network("10.88.3.0/24"), IPv4Network("10.88.9.9/32")]


@pytest.mark.parametrize("text", ["", "10.88.0.1/24", "10.88.0.0/30", "10.0.0.0/8", "fd00::/64", "x; reboot", "1/24"])
def test_subnets_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        subnets.parse(text)
    assert raised.value.field == "subnet"


def test_a_card_keeps_its_address(reservations: Reservations, tmp_path: Path) -> None:
    first = reservations.reserve(card(1), "web1").address
    assert (tmp_path / "hosts/00-16-3e-00-00-01").read_text() == f"{card(1)},{first},web1\n"
    again = Reservations(tmp_path, SMALL)
    again.load()
    assert again.reserve(card(1), "web1").address == first
    # Also when nothing is remembered at all.
    lost = Reservations(tmp_path / "lost", SMALL)
    lost.load()
    assert lost.reserve(card(1), "web1").address == first


def test_every_address_is_used_once_and_no_special_one(reservations: Reservations) -> None:
    given = {reservations.reserve(card(n), f"c{n}").address for n in range(5)}
    assert given == {f"10.88.7.{n}" for n in range(2, 7)}
    with pytest.raises(Conflict, match="no free address"):
        reservations.reserve(card(9), "full")
    freed = reservations.release(card(3))
    assert reservations.release(card(3)) is None
    assert reservations.reserve(card(9), "fits").address == freed


def test_a_new_name_is_told(reservations: Reservations) -> None:
    assert not reservations.reserve(card(1), "web1").replaced
    assert not reservations.reserve(card(1), "web1").replaced
    assert reservations.reserve(card(1), "web2").replaced


def test_a_hostname_that_dns_does_not_allow(reservations: Reservations, tmp_path: Path) -> None:
    reservations.reserve(card(1), "_web_[1]")
    name = (tmp_path / "hosts/00-16-3e-00-00-01").read_text().strip().split(",")[2]
    assert name == dns_label("_web_[1]")
    assert name.startswith("ct-")


@pytest.mark.parametrize("hwaddr", ["", "00:16:3E:00:00:01", "00:16:3e:00:00", "../../../etc/x", "00:16:3e:00:00:01\n"])
def test_hardware_addresses_that_are_none(reservations: Reservations, hwaddr: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as raised:
        reservations.reserve(hwaddr, "web1")
    assert raised.value.field == "hwaddr"
    with pytest.raises(InvalidRequest):
        reservations.release(hwaddr)
    assert list((tmp_path / "hosts").iterdir()) == []


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.mkdir()
    (hosts / "00-16-3e-00-00-01").write_text(f"{card(1)},192.168.0.5,web1\n")
    (hosts / "00-16-3e-00-00-02").write_text("")
    (hosts / "00-16-3e-00-00-03").write_text(f"{card(4)},10.88.7.3,stolen\n")
    (hosts / "00-16-3e-00-00-05").write_text(f"{card(5)},10.88.7.4,ok\n")
    found = Reservations(tmp_path, SMALL)
    found.load()
    assert sorted(path.name for path in hosts.iterdir()) == ["00-16-3e-00-00-01", "00-16-3e-00-00-05"]
    moved = found.reserve(card(1), "web1").address
    assert moved.startswith("10.88.7.")
    assert moved != "10.88.7.4"
    assert found.reserve(card(5), "ok").address == "10.88.7.4"


def test_cards_of_nobody_are_known(reservations: Reservations) -> None:
    for number in (1, 2, 3):
        reservations.reserve(card(number), f"h{number}")
    assert reservations.others([card(2), card(9)]) == [card(1), card(3)]
    assert reservations.others([card(1), card(2), card(3)]) == []


def test_a_lease_in_the_way_is_named(reservations: Reservations, tmp_path: Path) -> None:
    old = reservations.reserve(card(1), "old").address
    (tmp_path / "leases").write_text(f"duid 00:01\n1795447646 {card(1)} {old} old 01:{card(1)}\n")
    assert reservations.reserve(card(1), "old").evicted is None
    for number in range(2, 6):
        reservations.reserve(card(number), "x")
    reservations.release(card(1))
    assert reservations.reserve(card(9), "new").evicted == (card(1), old)


def test_the_nat_rules_are_of_one_table() -> None:
    text = nat.ruleset("vzfbr0", SMALL)
    assert "table ip vzfleet-vzfbr0 {" in text
    assert 'oifname != "vzfbr0" ip saddr 10.88.7.0/29 ip daddr != 10.88.7.0/29 counter masquerade' in text


def test_a_release_packet() -> None:
    packet = release_packet("00:16:3e:01:02:03", "10.88.0.9", "10.88.0.1")
    assert len(packet) >= 300
    assert packet[:4] == b"\x01\x01\x06\x00"
    assert packet[12:16] == bytes([10, 88, 0, 9])
    assert packet[28:34] == bytes.fromhex("00163e010203")
    assert packet[236:253] == b"\x63\x82\x53\x63\x35\x01\x07\x36\x04" + bytes([10, 88, 0, 1]) + b"\xff" + bytes(3)


def test_dnsmasq_takes_nothing_from_the_host(tmp_path: Path) -> None:
    arguments = Dnsmasq("vzfbr0", IPv4Interface("10.88.7.1/29"), tmp_path).arguments()
    assert {"--conf-file=/dev/null", "--no-hosts", "--interface=vzfbr0", "--except-interface=lo"} <= set(arguments)
    assert "--dhcp-range=10.88.7.0,static,255.255.255.248,1h" in arguments


def test_a_directory_that_dnsmasq_cannot_reach(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "dhcp").mkdir(parents=True)
    closed.chmod(0o700)
    with pytest.raises(DriverFailed, match="closed lets nobody but its owner pass"):
        require_passable(closed / "dhcp")


@pytest.mark.parametrize("bridge", ["", "a/b", "-x", "sixteen-letters-", 'a"b', "a b"])
def test_names_that_are_none_of_a_bridge(tmp_path: Path, bridge: str) -> None:
    with pytest.raises(InvalidRequest):
        Network(AgentConfig(state=tmp_path, node="n1", managed_bridge=bridge))


async def test_a_bridge_of_the_host_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def shown(*_arguments: str) -> list[dict[str, object]]:
        return [{"ifname": "lo", "linkinfo": {"info_kind": "bridge"}}]

    network = Network(AgentConfig(state=tmp_path, node="n1", bridge="lo"))
    with pytest.raises(DriverFailed, match="'lo' is no bridge"):
        await network.open()
    monkeypatch.setattr("agent.network.bridge._ip_json", shown)
    await network.open()
    assert (network.bridge, network.subnet) == ("lo", None)
    assert await network.reserve("101", card(1), "web1") is None
    await network.release(card(1))
    await network.close()
    await network.shut_down()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DriverFailed, match="no bridge 'vz-none'"):
        await Network(AgentConfig(state=tmp_path, node="n1", bridge="vz-none")).open()
