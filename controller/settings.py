"""The controller's settings: defaults, `<state>/controller.json`, then the command line."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from common.errors import InvalidRequest

DATABASE_URL = "VZFLEET_DATABASE_URL"
"""Name of the environment variable that goes over `database_url`: it may hold a password."""
Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[float, Meta(gt=0)]


class ControllerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one controller. Times in seconds, sizes in bytes."""

    state: Path
    host: str = "0.0.0.0"  # noqa: S104 - the API is meant for the network; everything but GET / needs a token
    port: Port = 8443
    agent_port: Port = 8444
    addresses: tuple[str, ...] = ()
    """Names and addresses by which others reach the controller; they stand in its certificate and in join tokens."""
    database_url: str = ""
    """`postgresql://USER@HOST/NAME` or `sqlite:///FILE`; empty means `controller.db` in the state directory."""
    overcommit_memory: Positive = 1.0
    """How many times a node's memory may be promised to containers."""
    overcommit_disk: Positive = 1.0
    """How many times a node's disk may be promised to containers."""
    spread_by_hostname: bool = False
    """Prefer nodes with fewer containers whose hostname has the same prefix (up to the last dash and digits)."""
    transfer_bandwidth: Annotated[int, Meta(ge=10_000)] | None = None
    """Bytes per second that each move or copy between nodes takes at most; without it as many as there are."""
    heartbeat_interval: Positive = 1.5
    heartbeat_timeout: Positive = 8.0
    sample_interval: Positive = 5.0
    operation_history: Positive = 30 * 86400.0
    """How long ended operations are kept, and events at most."""
    event_history: Annotated[int, Meta(gt=0)] = 100_000
    """How many events are kept."""
    idempotency_lifetime: Positive = 86400.0
    """How long the first answer to an Idempotency-Key is kept."""
    join_token_lifetime: Positive = 3600.0
    max_upload: Annotated[int, Meta(gt=0)] = 10 * 2**30
    """Largest image file that may be uploaded."""
    image_servers: dict[str, str] = msgspec.field(
        default_factory=lambda: {"images": "https://images.linuxcontainers.org"}
    )
    """Image servers (simplestreams) by name, each an https URL; `images` is asked for what is not here."""
    image_ca: Path | None = None
    """A PEM file of authorities that image servers of one's own are trusted by, beside the system's."""
    image_index_lifetime: Positive = 3600.0
    """How long what an image server has is not asked for again."""
    image_cache_expiry: Annotated[float, Meta(ge=0)] = 10.0
    """Days after its last use when an image that was fetched for a container is forgotten; 0: never."""
    image_update_interval: Annotated[float, Meta(ge=0)] = 6.0
    """Hours between two searches for newer versions of images with `auto_update`; 0: never."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def url(self) -> str:
        """The database's SQLAlchemy URL."""
        return self.database_url or f"sqlite:///{self.state / 'controller.db'}"

    @property
    def advertised(self) -> str:
        """The address that join tokens name."""
        return self.addresses[0] if self.addresses else socket.gethostname()


def load(state: Path, **overrides: object) -> ControllerSettings:
    """Settings of the controller in `state`; `overrides` that are None do not count.

    The environment's VZFLEET_DATABASE_URL goes over the file. Raises InvalidRequest naming the field that is wrong.
    """
    file = state / "controller.json"
    if os.environ.get(DATABASE_URL):
        overrides = {"database_url": os.environ[DATABASE_URL], **overrides}
    try:
        stored = msgspec.json.decode(file.read_bytes(), type=dict) if file.exists() else {}
        given = {key: value for key, value in overrides.items() if value is not None}
        values = {**stored, **given, "state": str(state)}
        return msgspec.convert(values, type=ControllerSettings, dec_hook=lambda kind, value: kind(value))
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{file}: {error}", field=str(file)) from None
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}", field=str(file)) from None


def save(settings: ControllerSettings) -> None:
    """Write what differs from the defaults to `controller.json`, but for what the environment says."""
    if settings.database_url == os.environ.get(DATABASE_URL):
        settings = msgspec.structs.replace(settings, database_url="")
    defaults = ControllerSettings(state=settings.state)
    fields = (name for name in settings.__struct_fields__ if name != "state")
    values = {name: getattr(settings, name) for name in fields if getattr(settings, name) != getattr(defaults, name)}
    encoded = msgspec.json.encode(values, enc_hook=str)
    (settings.state / "controller.json").write_bytes(msgspec.json.format(encoded, indent=2))
