"""An agent's settings: where it keeps its things and what it runs containers with.

`join` writes them to `<state>/agent.json`; the command line overrides them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from common.errors import InvalidRequest


class AgentConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one agent.

    `state` is its directory (mode 711, so that mapped roots pass); everything below it is the agent's own:
    `agent.key` (CURVE), `controller.pub` (Z85), `ca.crt`, `journal.db`, `lxc/`, `pool/`, `images/`.
    `controller` is `tcp://HOST:PORT` of the link, `api` `https://HOST:PORT`.
    """

    state: Path
    node: str
    controller: str = ""
    api: str = ""
    driver: Literal["lxc", "fake"] = "lxc"
    storage: Literal["auto", "btrfs", "dir"] = "auto"
    pool: Path | None = None
    """A directory on btrfs in which the agent makes one of its own, named as `cgroup`; None: a loop file."""
    pool_size: int = 20 * 10**9
    """Bytes of the (sparse) loop file."""
    bridge: str | None = None
    """A bridge that the host has; None: the agent makes and manages `managed_bridge`."""
    managed_bridge: str = "vzfbr0"
    subnet: str | None = None
    """IPv4 network of the managed bridge, such as 10.88.1.0/24; None: the first free one of 10.88.0.0/16."""
    cgroup: str = "vzfleet"
    """Directory in each cgroup hierarchy below which this node's containers are; one for each node of a machine."""
    first_id: int = 1_000_000
    """First host id of the id map of unprivileged containers."""
    id_count: int = 65_536
    sample_interval: float = 5.0
    """Seconds between two samples when no controller said otherwise."""
    autostart_delay: float | None = 120.0
    """Seconds after which containers start without the controller's word; None: never."""
    data_port: int = 8445
    """TCP port on which other nodes bring containers' data while a transfer is expected; 0: they come by the relay."""
    address: str | None = None
    """Host name or IP address at which other nodes reach this one; None: that of the route to the controller."""
    log_level: str = "info"


def load(path: Path) -> AgentConfig:
    """Read settings from JSON. Raises InvalidRequest naming the field that is wrong."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=AgentConfig, dec_hook=_decode)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{path}: {error}", field=str(path)) from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field=str(path)) from None


def encode(config: AgentConfig) -> str:
    """Settings as JSON, which `load` reads."""
    return msgspec.json.format(msgspec.json.encode(config, enc_hook=_encode), indent=2).decode() + "\n"


def _decode(kind: type, value: Any) -> Any:
    if kind is not Path:
        raise NotImplementedError(f"settings of type {kind.__name__} are not supported")
    if not isinstance(value, str):
        raise TypeError("a path is expected")
    return Path(value)


def _encode(value: Any) -> Any:
    if not isinstance(value, Path):
        raise NotImplementedError(f"settings of type {type(value).__name__} are not supported")
    return str(value)
