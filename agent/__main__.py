"""The agent's command line: `python -m agent join TOKEN`, `run`, `down`, `purge`."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import ipaddress
import logging
import os
import re
import signal
import sys
from pathlib import Path

import msgspec

from agent.addresses import check_address
from agent.app import Agent, only_one
from agent.config import AgentConfig, load
from agent.context import CommandFilter
from agent.enrolment import join
from agent.host_shutdown import stop_containers
from agent.teardown import down, purge
from common import VERSION, failpoints, logs
from common.clock import SystemClock
from common.errors import InvalidRequest, VzfleetError
from common.names import check_node_name
from common.process import watch_by_descriptor
from common.units import parse_size

DEFAULT_STATE = Path("/var/lib/vzfleet/agent")
# IFNAMSIZ is 16 with its final zero (Linux, if.h).
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_CGROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -3, -1


def _checked(pattern: re.Pattern[str], what: str, text: str) -> str:
    if not pattern.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no valid {what}")
    return text


def _interface(text: str) -> str:
    return _checked(_INTERFACE, "interface name", text)


def _cgroup(text: str) -> str:
    return _checked(_CGROUP, "cgroup directory", text)


def _node(text: str) -> str:
    try:
        return check_node_name(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(f"{error.text}: {error.allowed}") from None


def _size(text: str) -> int:
    try:
        return parse_size(text, "pool-size")
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(f"{error.text}: {error.allowed}") from None


def _subnet(text: str) -> str:
    try:
        return str(ipaddress.IPv4Network(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _delay(text: str) -> float | None:
    if text == "never":
        return None
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of seconds nor 'never'")
    return float(text)


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no TCP port: 1 to 65535, or 0 for none")
    return int(text)


def _address(text: str) -> str:
    try:
        return check_address(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(f"{error.text}: {error.allowed}") from None


def _directory(text: str) -> Path:
    return Path(text).absolute()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m agent", description=f"The agent of vzfleet {VERSION}.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--state", type=_directory, default=DEFAULT_STATE, help="the agent's directory (%(default)s)")
    joining = commands.add_parser("join", parents=[common], help="enrol this host with a controller's one-time token")
    joining.add_argument("token")
    joining.add_argument("--node", type=_node, help="the node's name, where the token leaves it open")
    joining.add_argument("--driver", choices=("lxc", "fake"), default="lxc")
    joining.add_argument("--storage", choices=("auto", "btrfs", "dir"), default="auto")
    joining.add_argument("--pool", type=_directory, help="a directory on btrfs, instead of a loop file")
    joining.add_argument("--pool-size", type=_size, default=20 * 10**9, help="size of the loop file (20GB)")
    joining.add_argument("--bridge", type=_interface, help="a bridge that the host has")
    joining.add_argument("--managed-bridge", type=_interface, default="vzfbr0", help="name of a bridge of its own")
    joining.add_argument("--subnet", type=_subnet, help="IPv4 network of the managed bridge, as 10.88.1.0/24")
    joining.add_argument("--cgroup", type=_cgroup, default="vzfleet", help="directory in each cgroup hierarchy")
    joining.add_argument(
        "--autostart-delay", type=_delay, default=120.0, help="seconds without a controller, or 'never' (120)"
    )
    joining.add_argument("--data-port", type=_port, default=8445, help="for containers' data of other nodes (8445)")
    joining.add_argument("--address", type=_address, help="where other nodes reach this host (found by its routes)")
    running = commands.add_parser("run", parents=[common], help="run until SIGTERM or SIGINT")
    running.add_argument("--pid-file", type=_directory)
    commands.add_parser("down", parents=[common], help="stop all containers, and what runs for them")
    commands.add_parser("purge", parents=[common], help="remove everything that the agent ever made here")
    return parser


async def _join(options: argparse.Namespace) -> None:
    config = AgentConfig(
        state=options.state,
        node=options.node or "",
        driver=options.driver,
        storage=options.storage,
        pool=options.pool,
        pool_size=options.pool_size,
        bridge=options.bridge,
        managed_bridge=options.managed_bridge,
        subnet=options.subnet,
        cgroup=options.cgroup,
        autostart_delay=options.autostart_delay,
        data_port=options.data_port,
        address=options.address,
    )
    joined = await join(options.token, config, SystemClock())
    print(f"this host is node {joined.node} of {joined.api}; start it: python -m agent run --state {joined.state}")


async def _run(options: argparse.Namespace) -> None:
    config = _settings(options)
    with only_one(config.state):
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        agent = Agent(config, failpoints=failpoints.from_environment(), at_end=stop_containers)
        pid_file: Path | None = options.pid_file
        if pid_file is not None:
            pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
        try:
            await agent.run(stop)
        finally:
            if pid_file is not None:
                pid_file.unlink(missing_ok=True)


def _settings(options: argparse.Namespace) -> AgentConfig:
    """The settings that `join` wrote, at the place where they are found now."""
    state: Path = options.state
    return msgspec.structs.replace(load(state / "agent.json"), state=state)


async def _purge(options: argparse.Namespace) -> None:
    if not (options.state / "agent.json").exists():
        print(f"there is no agent in {options.state}")
        return
    await purge(_settings(options))


def _set_up_logs(options: argparse.Namespace) -> None:
    known = (options.state / "agent.json").exists()
    logs.set_up(_settings(options).log_level if known else "info")
    for handler in logging.getLogger().handlers:
        handler.addFilter(CommandFilter())


def _stay_small() -> None:
    """Give memory back (mallopt(3)): one heap for all threads, large blocks by mmap, the free top trimmed."""
    library = ctypes.CDLL(None)
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 65536), (M_TRIM_THRESHOLD, 65536)):
        library.mallopt(parameter, value)


def main() -> int:
    """Run one command; 0 when it went well, 1 with the reason on standard error when not."""
    options = _parser().parse_args()
    try:
        _set_up_logs(options)
        watch_by_descriptor()
        _stay_small()
        match options.command:
            case "join":
                asyncio.run(_join(options))
            case "run":
                asyncio.run(_run(options))
            case "down":
                asyncio.run(down(_settings(options)))
            case "purge":
                asyncio.run(_purge(options))
    except (VzfleetError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
