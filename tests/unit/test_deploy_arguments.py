"""The command line of deploy/quickstart."""

from pathlib import Path

import pytest

from deploy.lib.arguments import DEFAULT_STATE, parse


def test_without_options_nothing_is_fixed_but_the_state_directory() -> None:
    options = parse([])
    assert (options.state, options.port, options.agent_port, options.nodes) == (DEFAULT_STATE, None, None, None)
    assert options.demo and not options.down and not options.purge and options.join is None


def test_every_option_is_read(tmp_path: Path) -> None:
    options = parse(["--state", str(tmp_path), "--port", "9443", "--agent-port", "9444", "--nodes", "3", "--no-demo"])
    assert (options.state, options.port, options.agent_port, options.nodes) == (tmp_path, 9443, 9444, 3)
    assert not options.demo
    assert parse(["--join", "token"]).join == "token"
    given = parse(["--join", "token", "--bridge", "br0", "--pool", str(tmp_path)])
    assert (given.bridge, given.pool) == ("br0", tmp_path)
    assert parse(["--down", "--purge"]).purge


def test_a_relative_state_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["--state", "fleet"]).state == tmp_path / "fleet"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--purge"],
        ["--down", "--nodes", "2"],
        ["--down", "--no-demo"],
        ["--down", "--bridge", "br0"],
        ["--down", "--pool", "/pool"],
        ["--bridge", "br0", "--nodes", "2"],
        ["--bridge", "a/b"],
        ["--bridge", "sixteen-letters-"],
        ["--bridge", ""],
        ["--join", "token", "--nodes", "2"],
        ["--port", "9443", "--agent-port", "9443"],
        ["--port", "0"],
        ["--port", "65536"],
        ["--port", "٣"],
        ["--nodes", "0"],
        ["--nodes", "65"],
        ["--nodes", "-1"],
        ["--state", "/var/tmp/a b"],
        ["--state", "/var/tmp/a%b"],
        ["--state", "/var/tmp/a\nb"],
        ["--state", "/"],
        ["--unknown"],
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
