"""`python -m controller init | run | token | upgrade-db`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import sys
from pathlib import Path

from common import logs
from common.clock import SystemClock
from common.errors import VzfleetError
from common.instance import only_one
from common.process import watch_by_descriptor
from controller import settings as settings_module
from controller.api.identity import ROLES
from controller.app import App, prepare_state
from controller.services.identities import new_token
from controller.settings import ControllerSettings
from controller.spool import Spool
from controller.store import schema

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        settings = settings_module.load(
            options.state,
            host=getattr(options, "host", None),
            port=getattr(options, "port", None),
            agent_port=getattr(options, "agent_port", None),
            addresses=getattr(options, "address", None),
            log_level=getattr(options, "log_level", None),
        )
        logs.set_up(settings.log_level)
        code: int = options.command(settings, options)
        return code
    except VzfleetError as error:
        print(f"controller: {error.text}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"controller: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m controller", description="The controller of a vzfleet.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("init", _init, "make database, keys and certificate (again: bring them up to date)"),
        ("run", _run, "serve the API until SIGTERM"),
        ("token", _token, "make a bearer token and print it"),
        ("upgrade-db", _upgrade, "bring the database to this version's schema"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--state", type=Path, required=True, help="the controller's directory")
        if name in ("init", "run"):
            sub.add_argument("--host", help="address to listen on (all)")
            sub.add_argument("--port", type=int, help="port of the API (8443)")
            sub.add_argument("--agent-port", type=int, help="port of the agents' link (8444)")
            sub.add_argument("--address", nargs="+", help="names and addresses by which others reach the controller")
        if name == "run":
            sub.add_argument("--pid-file", type=Path, help="write the process's pid there")
            sub.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
        if name == "token":
            sub.add_argument("--name", default="admin", help="what the token is called")
            sub.add_argument("--role", default="admin", choices=sorted(ROLES))
    return parser


def _init(settings: ControllerSettings, _options: argparse.Namespace) -> int:
    prepare_state(settings)
    schema.upgrade(settings.url)
    settings_module.save(settings)
    return 0


def _upgrade(settings: ControllerSettings, _options: argparse.Namespace) -> int:
    schema.upgrade(settings.url)
    return 0


def _token(settings: ControllerSettings, options: argparse.Namespace) -> int:
    schema.check(settings.url)
    text, record = new_token(options.name, options.role, SystemClock())
    # The running controller takes it in at its first use, another one at its start.
    Spool(settings.state).put(record)
    print(text)
    return 0


def _run(settings: ControllerSettings, options: argparse.Namespace) -> int:
    # Two of them on one database would both carry out its operations.
    with only_one(settings.state / "controller.lock", "a controller"):
        return _run_alone(settings, options)


def _run_alone(settings: ControllerSettings, options: argparse.Namespace) -> int:
    if options.pid_file is not None:
        options.pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
    # Two descriptors an agent and one a client: the soft limit is often 1,024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    watch_by_descriptor()
    try:
        asyncio.run(_serve(settings))
    finally:
        if options.pid_file is not None:
            options.pid_file.unlink(missing_ok=True)
    return 0


async def _serve(settings: ControllerSettings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    app = App(settings)
    await app.start()
    try:
        await stopping.wait()
    finally:
        await app.stop()


if __name__ == "__main__":
    sys.exit(main())
