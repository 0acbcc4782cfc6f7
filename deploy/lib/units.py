"""systemd units: rendered from `deploy/systemd/`, installed, removed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from deploy.lib.arguments import DEFAULT_STATE
from deploy.lib.console import run
from deploy.lib.state import State

TEMPLATES = Path(__file__).resolve().parents[1] / "systemd"
UNITS = Path("/etc/systemd/system")


# Not string.Template: systemd itself means something by `$`.
_PLACE = re.compile(r"@([a-z]+)@")


def systemd_runs() -> bool:
    """Whether systemd is this machine's init; see sd_booted(3)."""
    return Path("/run/systemd/system").is_dir()


def prefix(state: State) -> str:
    """What the units' names begin with: `vzfleet`, and the directory's tag where it is not the usual one."""
    return "vzfleet" if state.root == DEFAULT_STATE else f"vzfleet-{state.tag}"


def name(state: State, service: str) -> str:
    """The unit of a service, such as `vzfleet-controller.service`."""
    return f"{prefix(state)}-{service}.service"


def render(template: str, state: State, *, unit: str, command: Sequence[str]) -> str:
    """The text of a unit. State paths and names have no character that systemd would take for its own."""
    values = {"unit": unit, "prefix": prefix(state), "state": str(state.root), "command": " ".join(command)}
    return _PLACE.sub(lambda match: values[match[1]], (TEMPLATES / template).read_text())


def install(unit: str, text: str) -> bool:
    """Write a unit and make systemd read it; returns whether it was changed."""
    path = UNITS / unit
    if path.exists() and path.read_text() == text:
        return False
    path.write_text(text)
    run(["systemctl", "daemon-reload"])
    return True


def remove(unit: str) -> None:
    """Stop a unit, and take it away: it does not come back with the host."""
    path = UNITS / unit
    if not path.exists():
        return
    run(["systemctl", "disable", "--now", unit], timeout=120)
    path.unlink()
    run(["systemctl", "daemon-reload"])
    run(["systemctl", "reset-failed", unit], check=False)


def enable(unit: str) -> None:
    """Start a unit now, and with the host."""
    run(["systemctl", "enable", "--now", unit], timeout=120)
