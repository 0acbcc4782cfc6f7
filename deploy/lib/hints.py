"""What is shown at the end: the dashboard's address, and what to type next."""

from __future__ import annotations

import json

from deploy.lib import addresses, demo
from deploy.lib.arguments import DEFAULT_STATE
from deploy.lib.state import Settings, State


def for_fleet(state: State, settings: Settings, container: str | None) -> str:
    """The text for a machine with a controller; `container` is the JSON of the first container, if it was made."""
    parts = []
    if container is not None:
        parts.append(f"GET {demo.PATH}\n{container}")
    host = addresses.primary() or "127.0.0.1"
    parts.append(f"Dashboard: https://{host}:{settings.port}/ui/   (the token: grep TOKEN {state.env_file})")
    parts.append("\n".join(["Next:", *(f"  {line}" for line in _commands(state))]))
    return "\n" + "\n\n".join(parts)


def for_agent(state: State, settings: Settings) -> str:
    """The text for a machine with just an agent."""
    names = ", ".join(node.name for node in settings.nodes)
    return f"\nThe agent of {names} runs; the controller lists it under GET /1.0/nodes.\n\n  {_again(state)} --down\n"


def _again(state: State) -> str:
    return "deploy/quickstart" if state.root == DEFAULT_STATE else f"deploy/quickstart --state {state.root}"


def _commands(state: State) -> list[str]:
    header = '-H "Authorization: Bearer $VZFLEET_TOKEN" -H "Content-Type: application/json"'
    new = {"hostname": "my-new-container", "config": {"limits.cpus": "1"}, "source": demo.REQUEST["source"]}
    return [
        f"set -a; . {state.env_file}; set +a",
        f'vz() {{ curl -sS --cacert "$VZFLEET_CACERT" {header} "$@"; }}',
        'vz "$VZFLEET_URL/1.0/vz?recursion=1"',
        f"""vz -X POST "$VZFLEET_URL/1.0/vz/101" -d '{json.dumps(new)}'""",
        """vz -X PUT "$VZFLEET_URL/1.0/vz/101/state" -d '{"action": "start"}'""",
        'vz "$VZFLEET_URL/1.0/vz/101"',
        """vz -X POST "$VZFLEET_URL/1.0/nodes" -d '{"name": "web2"}'   # a token for a second host, and there:""",
        "                                                           #   deploy/quickstart --join TOKEN",
        f"{_again(state)} --down   # stop all; with --purge: remove all",
    ]
