"""`python -m controller init | run | token | upgrade-db | backup | restore`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from common import logs
from common.clock import SystemClock
from common.errors import Conflict, VzfleetError
from common.instance import only_one
from common.process import watch_by_descriptor
from controller import settings as settings_module
from controller.api.identity import ROLES
from controller.app import App, prepare_state
from controller.services.identities import new_token
from controller.settings import ControllerSettings
from controller.spool import Spool
from controller.store import backup, schema
from controller.store.health import RESTORE

log = logging.getLogger(__name__)
NOT_IN_A_BACKUP = (
    "link.key and tls/ (the keys by which agents and clients know the controller), controller.json, images/. "
    "Of tokens it holds the hashes, of no token the text"
)


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
        ("backup", _backup, "copy the database to a new file, also while the controller runs"),
        ("restore", _restore, "put a backup in the place of the database, while no controller runs"),
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
        if name in ("backup", "restore"):
            sub.add_argument("file", type=Path, help="the file of the backup")
        if name == "token":
            sub.add_argument("--name", default="admin", help="what the token is called")
            sub.add_argument("--role", default="admin", choices=sorted(ROLES))
    return parser


def _init(settings: ControllerSettings, _options: argparse.Namespace) -> int:
    prepare_state(settings)
    _bring_up_to_date(settings)
    settings_module.save(settings)
    return 0


def _upgrade(settings: ControllerSettings, _options: argparse.Namespace) -> int:
    _bring_up_to_date(settings)
    return 0


def _bring_up_to_date(settings: ControllerSettings) -> None:
    current, wanted = schema.revisions(settings.url)
    if current == wanted:
        return
    mark = settings.state / "store.mark"
    if current is None and mark.exists():
        raise Conflict(
            f"the database is empty or gone, and should not be: {RESTORE}, or remove {mark} to begin with an empty one"
        )
    with _alone(settings):
        schema.upgrade(settings.url)


def _backup(settings: ControllerSettings, options: argparse.Namespace) -> int:
    schema.check(settings.url)
    for line in backup.backup(settings.url, options.file):
        print(line)
    print(f"{options.file}: all of the database. Keep beside it, of {settings.state}: {NOT_IN_A_BACKUP}")
    return 0


def _restore(settings: ControllerSettings, options: argparse.Namespace) -> int:
    with _alone(settings):
        for line in backup.restore(settings.url, options.file):
            print(line)
    print("the controller accepts writes again when its nodes have told what they have: GET /1.0/reconciliation")
    return 0


def _alone(settings: ControllerSettings) -> AbstractContextManager[None]:
    """The lock of the controller. Raises Conflict while one runs."""
    return only_one(settings.state / "controller.lock", "a controller")


def _token(settings: ControllerSettings, options: argparse.Namespace) -> int:
    schema.check(settings.url)
    text, record = new_token(options.name, options.role, SystemClock())
    # The running controller takes it in at its first use, another one at its start.
    Spool(settings.state).put(record)
    print(text)
    return 0


def _run(settings: ControllerSettings, options: argparse.Namespace) -> int:
    # Two of them on one database would both carry out its operations.
    with _alone(settings):
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
