"""The command line of `deploy/quickstart`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_STATE = Path("/var/lib/vzfleet")
DEFAULT_PORT = 8443
DEFAULT_AGENT_PORT = 8444
MAX_NODES = 64
# Stands unquoted in systemd units and in LXC's configuration.
_DIRECTORY = re.compile(r"/[A-Za-z0-9._/+-]+")
# IFNAMSIZ is 16 with its final zero (Linux, if.h).
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")


@dataclass(frozen=True)
class Options:
    """What was asked for. None in `port`, `agent_port` and `nodes`: as it was set up, else the default."""

    state: Path
    port: int | None
    agent_port: int | None
    nodes: int | None
    demo: bool
    down: bool
    purge: bool
    join: str | None
    bridge: str | None
    pool: Path | None


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; ends the program with code 2 and the reason when it makes no sense."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.purge and not given.down:
        parser.error("--purge goes with --down")
    setting_up = (given.nodes, given.join, given.no_demo, given.port, given.agent_port, given.bridge, given.pool)
    if given.down and any(setting_up):
        parser.error("--down goes with --state and --purge only")
    if given.join and (given.nodes or given.port or given.agent_port):
        parser.error("--join sets up one agent and no controller: it goes with --state, --bridge and --pool only")
    if given.bridge and given.nodes:
        parser.error("--bridge is one of the host's own network, which the nodes of --nodes do not have")
    if given.port and given.port == given.agent_port:
        parser.error("--port and --agent-port must differ")
    return Options(
        state=given.state,
        port=given.port,
        agent_port=given.agent_port,
        nodes=given.nodes,
        demo=not given.no_demo,
        down=given.down,
        purge=given.purge,
        join=given.join,
        bridge=given.bridge,
        pool=given.pool,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deploy/quickstart",
        description="Set up a controller and an agent on this machine, start a container and show it. "
        "Run again, it starts just what is not running.",
    )
    add = parser.add_argument
    add("--state", type=_directory, default=DEFAULT_STATE, metavar="DIR", help=f"where all is kept ({DEFAULT_STATE})")
    add("--port", type=_port, metavar="PORT", help=f"of the REST API and the dashboard ({DEFAULT_PORT})")
    add("--agent-port", type=_port, metavar="PORT", help=f"where agents connect ({DEFAULT_AGENT_PORT})")
    add("--nodes", type=_nodes, metavar="N", help="N agents, node1 to nodeN, each in a network namespace of its own")
    add("--no-demo", action="store_true", help="do not create the first container")
    add("--join", metavar="TOKEN", help="set up just an agent, for the controller that gave TOKEN")
    add("--bridge", type=_interface, metavar="NAME", help="a bridge that the host has, with its own DHCP")
    add(
        "--pool",
        type=_directory,
        metavar="DIR",
        help="a directory on a btrfs that the host has, instead of a loop file",
    )
    add("--down", action="store_true", help="stop everything that was started; the state stays")
    add("--purge", action="store_true", help="with --down: remove everything, the containers too")
    return parser


def _directory(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not _DIRECTORY.fullmatch(str(path)):
        raise argparse.ArgumentTypeError(f"{str(path)!r}: a path of letters, digits and . _ - + / is expected")
    return path


def _interface(text: str) -> str:
    if not _INTERFACE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: the name of a network interface is expected")
    return text


def _port(text: str) -> int:
    return _number(text, 1, 65_535)


def _nodes(text: str) -> int:
    return _number(text, 1, MAX_NODES)


def _number(text: str, lowest: int, highest: int) -> int:
    if not text.isascii() or not text.isdigit() or not lowest <= int(text) <= highest:
        raise argparse.ArgumentTypeError(f"{text!r}: {lowest} to {highest} is expected")
    return int(text)
