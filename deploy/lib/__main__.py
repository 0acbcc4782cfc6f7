"""`deploy/quickstart`: sets up a controller, agents and a first container, or takes them away again."""

from __future__ import annotations

import os
import sys

from deploy.lib import arguments, down, state, up
from deploy.lib.arguments import Options
from deploy.lib.console import DeployError, say
from deploy.lib.state import Settings, State


def main() -> int:
    """Do what the command line asks; returns the exit code."""
    options = arguments.parse(sys.argv[1:])
    os.umask(0o022)
    try:
        if os.geteuid() != 0:
            raise DeployError("deploy/quickstart sets up containers, bridges and pools: run it as root")
        place = State(options.state)
        return _down(place, options) if options.down else _up(place, options)
    except DeployError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; run it again to go on", file=sys.stderr)
        return 130


def _up(place: State, options: Options) -> int:
    state.prepare(place)
    with state.alone(place):
        before = state.load(place)
        only_agent = options.join is not None or (before is not None and before.port == 0)
        if only_agent:
            text = up.agent_here(place, _agent_only(place, before), options.join)
        else:
            text = up.fleet_here(place, before, options)
    say("ready")
    print(text, flush=True)
    return 0


def _agent_only(place: State, before: Settings | None) -> Settings | None:
    if before is not None and before.port != 0:
        raise DeployError(f"{place.root} holds a controller: give another directory by --state to --join")
    return before


def _down(place: State, options: Options) -> int:
    settings = state.load(place)
    if settings is None:
        say(f"nothing is set up in {place.root}")
        return 0
    with state.alone(place):
        down.stop(place, settings)
        if options.purge:
            down.purge(place, settings)
    say("nothing is left" if options.purge else f"stopped; the state stays in {place.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
