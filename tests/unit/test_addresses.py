"""Where other nodes reach a node."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from agent import __main__ as command_line
from agent import addresses
from agent.addresses import check_address, transfer_address
from agent.config import AgentConfig
from common.errors import InvalidRequest


def config(**settings: Any) -> AgentConfig:
    return AgentConfig(state=Path("/nowhere"), node="n", **{"controller": "tcp://127.0.0.1:8444", **settings})


async def test_what_is_set_is_told() -> None:
    assert await transfer_address(config(address="node7.example", data_port=9000)) == "tcp://node7.example:9000"
    assert await transfer_address(config(address="fd00::7")) == "tcp://[fd00::7]:8445"
    assert await transfer_address(config(address="node7.example", data_port=0)) is None


async def test_the_address_on_the_way_to_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def local(host: str, port: int) -> str:
        asked.append((host, port))
        return "127.0.0.1" if host == "127.0.0.1" else "10.1.2.3"

    monkeypatch.setattr(addresses, "_local_address", local)
    assert await transfer_address(config(controller="tcp://[fd00::1]:8444")) == "tcp://10.1.2.3:8445"
    assert asked == [("fd00::1", 8444)]
    # On the controller's own host that is no address for others.
    assert await transfer_address(config()) == "tcp://10.1.2.3:8445"


async def test_a_host_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def local(host: str, _port: int) -> str:
        if host == "127.0.0.1":
            return "127.0.0.1"
        raise OSError("no route")

    monkeypatch.setattr(addresses, "_local_address", local)
    assert await transfer_address(config()) == "tcp://127.0.0.1:8445"
    assert await transfer_address(config(controller="tcp://elsewhere:8444")) is None


async def test_this_machine_has_an_address() -> None:
    told = await transfer_address(config())
    assert told is not None
    ipaddress.ip_address(told.removeprefix("tcp://").removesuffix(":8445"))


@pytest.mark.parametrize("text", ["", "a b", "a/b", "-a", "tcp://a", "a:1", "é", "a\n", "[::1]"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_address(text)
    assert caught.value.field == "address"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--data-port", "70000"], "--data-port"),
        (["--data-port", "x"], "--data-port"),
        (["--address", "a b"], "--addr"),
    ],
)
def test_join_names_the_option_that_is_wrong(
    options: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line._parser().parse_args(["join", *options, "token"])
    assert names in capsys.readouterr().err


def test_join_takes_both() -> None:
    given = command_line._parser().parse_args(["join", "--data-port", "9000", "--address", "10.0.0.7", "token"])
    assert (given.data_port, given.address) == (9000, "10.0.0.7")
