"""What a machine is to be, from earlier settings and the command line; and free networks."""

import ipaddress
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import pytest

from deploy.lib import plan, tokens
from deploy.lib.addresses import CONTAINER_POOL, FABRIC_POOL, free, hosts
from deploy.lib.arguments import parse
from deploy.lib.console import DeployError
from deploy.lib.state import Settings, State

STATE = State(Path("/var/tmp/somewhere"))


def decide(*arguments: str, before: Settings | None = None, used: tuple[str, ...] = ()) -> Settings:
    return plan.decide(STATE, before, parse(arguments), [ipaddress.IPv4Network(network) for network in used])


def test_without_options_one_node_in_the_hosts_own_network() -> None:
    settings = decide()
    assert (settings.port, settings.agent_port, settings.fabric) == (8443, 8444, None)
    assert [(node.name, node.namespace) for node in settings.nodes] == [("node1", False)]


@pytest.mark.parametrize("count", [1, 3, 64])
def test_nodes_have_namespaces_and_networks_of_their_own(count: int) -> None:
    settings = decide("--nodes", str(count))
    assert [node.name for node in settings.nodes] == [f"node{index}" for index in range(1, count + 1)]
    assert all(node.namespace for node in settings.nodes)
    assert len({node.subnet for node in settings.nodes}) == count
    assert settings.fabric is not None
    assert len(hosts(settings.fabric)) > max(node.index for node in settings.nodes)


def test_the_same_command_again_changes_nothing() -> None:
    for arguments in ([], ["--nodes", "3"], ["--port", "9443", "--agent-port", "9444"]):
        first = decide(*arguments)
        assert decide(*arguments, before=first) == first
        assert decide(before=first) == first


def test_more_nodes_are_added_and_fewer_remove_none() -> None:
    one = decide()
    three = decide("--nodes", "3", before=one)
    assert three.nodes[0] == one.nodes[0]
    assert [node.namespace for node in three.nodes] == [False, True, True]
    assert three.fabric is not None
    assert len({node.subnet for node in three.nodes}) == 3
    assert decide("--nodes", "2", before=three) == three


@pytest.mark.parametrize("option", ["--port", "--agent-port"])
def test_another_port_than_the_agents_know_is_refused(option: str) -> None:
    with pytest.raises(DeployError, match=f"{option} .* --down --purge first"):
        decide(option, "9999", before=decide())


def test_ports_that_meet_by_default_are_refused() -> None:
    with pytest.raises(DeployError, match="must differ"):
        decide("--port", "8444")


def test_networks_in_use_are_avoided() -> None:
    first = decide("--nodes", "1")
    assert first.fabric and first.nodes[0].subnet
    second = decide("--nodes", "1", used=(first.fabric, first.nodes[0].subnet))
    assert second.fabric != first.fabric
    assert second.nodes[0].subnet != first.nodes[0].subnet


def test_a_full_pool_is_refused() -> None:
    with pytest.raises(DeployError, match="not enough"):
        decide(used=(str(CONTAINER_POOL),))
    with pytest.raises(DeployError, match="nothing of"):
        decide("--nodes", "1", used=(str(FABRIC_POOL),))


def test_free_networks_go_round_and_skip_overlaps() -> None:
    taken = [ipaddress.IPv4Network("10.87.255.128/25"), ipaddress.IPv4Network("10.87.0.0/23")]
    assert list(islice(free(FABRIC_POOL, 254, taken), 2)) == ["10.87.254.0/24", "10.87.2.0/24"]
    assert len(list(free(FABRIC_POOL, 7, taken))) == 253


def join(text: str, *arguments: str, before: Settings | None = None) -> Settings:
    return plan.decide_agent(before, parse(["--join", text, *arguments]), [])


@pytest.fixture
def listening() -> Iterator[int]:
    """A port that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.fixture
def closed() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def invitation(api: int, link: int, expires: datetime) -> str:
    said = {"api": f"https://127.0.0.1:{api}", "link": f"tcp://127.0.0.1:{link}", "secret": "s"}
    return tokens.encode({**said, "expires": expires.isoformat().replace("+00:00", "Z")})


def test_a_token_is_tried_before_anything_is_installed(listening: int, closed: int) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    tokens.check(invitation(listening, listening, soon))
    with pytest.raises(DeployError, match=r"the token expired at .*: ask the controller for a new one"):
        tokens.check(invitation(listening, listening, soon - timedelta(days=1)))
    for api, link in ((listening, closed), (closed, listening)):
        with pytest.raises(DeployError, match=f"cannot be reached at 127.0.0.1 port {closed}: Connection refused"):
            tokens.check(invitation(api, link, soon))


@pytest.mark.parametrize("fields", [{}, {"expires": 7}, {"expires": "soon"}, {"expires": "2999-01-01T00:00:00"}])
def test_a_token_with_a_field_that_is_none_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DeployError, match="no join token"):
        tokens.check(token(**fields))
    with pytest.raises(DeployError, match="no join token"):
        tokens.check(token(expires="2999-01-01T00:00:00Z", api=["x"]))


def token(**fields: object) -> str:
    return tokens.encode({"api": "https://h:1", "link": "tcp://h:2", "secret": "s", **fields})


def test_a_joining_host_is_named_by_the_token_else_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [node.name for node in join(token(node="web2")).nodes] == ["web2"]
    monkeypatch.setattr("socket.gethostname", lambda: "Host7.example.org")
    named_by_host = join(token(node=None))
    assert [node.name for node in named_by_host.nodes] == ["host7"]
    assert named_by_host.port == 0
    assert named_by_host.nodes[0].subnet != join(token(node="web2")).nodes[0].subnet


@pytest.mark.parametrize("text", ["", "nonsense", "e30", "W10", "\n", "é", token(node="../x"), token(node="-x")])
def test_what_is_no_join_token_is_refused(text: str) -> None:
    with pytest.raises(DeployError, match=r"no join token|cannot name a node"):
        join(text)


def test_a_host_that_has_joined_keeps_what_it_is() -> None:
    joined = join(token(node="web2"))
    assert join("nonsense", before=joined) == joined
    with pytest.raises(DeployError, match="holds a controller"):
        join(token(node="web2"), before=decide())


def test_an_agent_host_cannot_become_a_controller() -> None:
    with pytest.raises(DeployError, match="holds just an agent"):
        decide(before=join(token(node="web2")))


def test_a_bridge_of_the_host_needs_no_network_of_ours(tmp_path: Path) -> None:
    given = ("--bridge", "br0", "--pool", str(tmp_path))
    for settings in (decide(*given), join(token(node="web2"), *given)):
        assert [(node.bridge, node.pool, node.subnet) for node in settings.nodes] == [("br0", str(tmp_path), None)]


def test_later_nodes_are_in_the_pool_of_the_first(tmp_path: Path) -> None:
    settings = decide("--nodes", "2", before=decide("--nodes", "1", "--pool", str(tmp_path)))
    assert [node.pool for node in settings.nodes] == [str(tmp_path)] * 2


@pytest.mark.parametrize(("option", "value"), [("--bridge", "br1"), ("--pool", "/other")])
def test_another_bridge_or_pool_than_before_is_refused(option: str, value: str) -> None:
    for first in ((), ("--bridge", "br0", "--pool", "/pool")):
        with pytest.raises(DeployError, match=f"set up with.* {option}.*: --down --purge first"):
            decide(option, value, before=decide(*first))
        with pytest.raises(DeployError, match=f"web2 .* set up with.* {option}"):
            join("nonsense", option, value, before=join(token(node="web2"), *first))
