"""`deploy/quickstart`: sets up a controller, agents and a first container, or takes them away again."""

from __future__ import annotations

import os
import sys

from deploy.lib import addresses, arguments, down, existing, fleet, packages, plan, state, tokens, up
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
    except (DeployError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; run it again to go on", file=sys.stderr)
        return 130


def _up(place: State, options: Options) -> int:
    state.check(place)
    settings = _decide(place, options)
    existing.check(settings)
    state.prepare(place)
    with state.alone(place):
        state.save(place, settings)
        if settings.port == 0:
            text = up.agent_here(place, settings, options.join)
        else:
            text = up.fleet_here(place, settings, options.demo)
    say("ready")
    print(text, flush=True)
    return 0


def _decide(place: State, options: Options) -> Settings:
    packages.install(["iproute2"])  # to see which networks are free
    before = state.load(place)
    if options.join is not None:
        if before is not None and before.port == 0 and not any(fleet.joined(place, node) for node in before.nodes):
            before = None  # an earlier token was refused; this one may be for another name
        settings = plan.decide_agent(before, options, addresses.used())
        if before is None:
            tokens.check(options.join)
        return settings
    if before is not None and before.port == 0 and not (options.nodes or options.port or options.agent_port):
        return plan.decide_agent(before, options, [])
    return plan.decide(place, before, options, addresses.used())


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
