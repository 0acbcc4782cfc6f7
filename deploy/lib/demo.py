"""The first container: created and started through the API, as anybody would."""

from __future__ import annotations

import json
from typing import Any

from deploy.lib.api import Api
from deploy.lib.console import say, wait_until

ID = "demo"
PATH = f"/1.0/vz/{ID}"
RUNNING, ERROR = 103, 112
ADDRESS_TIMEOUT = 20.0
REQUEST = {
    "hostname": "demo",
    "config": {"limits.memory": "256MB", "limits.cpus": "1"},
    "source": {"type": "image", "properties": {"os": "busybox"}},
}


def up(api: Api) -> str:
    """Create and start the container where it is not there or does not run; returns the JSON of its GET.

    The address comes by DHCP a moment after the start; it is waited for up to 20 s.
    """
    container = api.find(PATH)
    if container is None or _creation_failed(container):
        say(f"creating container {ID} from the busybox image")
        api.send("POST", PATH, REQUEST)
    if api.get(PATH)["status"]["status_code"] != RUNNING:
        say(f"starting container {ID}")
        api.send("PUT", f"{PATH}/state", {"action": "start"})
    wait_until(lambda: _address(api.get(PATH)) is not None, ADDRESS_TIMEOUT)
    return json.dumps(api.get(PATH), indent=4)


def _creation_failed(container: dict[str, Any]) -> bool:
    """Whether it is an Error of its own, not of its node's; a new POST replaces it then."""
    status = container["status"]
    return status["status_code"] == ERROR and "last_status" not in status


def _address(container: dict[str, Any]) -> str | None:
    machine = container["status"]["machine"]
    return machine[0]["ip_address"] if machine else None
