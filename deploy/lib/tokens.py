"""Join tokens: URL-safe base64 of a JSON object, without padding."""

from __future__ import annotations

import base64
import json
import socket
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from deploy.lib.console import DeployError

CONNECT_TIMEOUT = 10.0
_NONE = "this is no join token: POST /1.0/nodes on the controller gives one; copy all of it"


def decode(token: str) -> dict[str, Any]:
    """What a token says. Raises DeployError when it is none."""
    try:
        said = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except ValueError:
        said = None
    if not isinstance(said, dict) or not {"api", "link", "secret"} <= said.keys():
        raise DeployError(_NONE)
    return said


def check(token: str) -> None:
    """See, before minutes of installing, that a token can still be used from here.

    Raises DeployError when it has expired, or when a port of the controller that it names cannot be reached.
    """
    said = decode(token)
    try:
        expired = datetime.fromisoformat(said["expires"]) <= datetime.now(UTC)
        targets = [(parts.hostname or "", parts.port or 0) for parts in map(urlsplit, (said["api"], said["link"]))]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DeployError(_NONE) from None
    if expired:
        raise DeployError(f"the token expired at {said['expires']}: ask the controller for a new one")
    for host, port in targets:
        try:
            socket.create_connection((host, port), CONNECT_TIMEOUT).close()
        except OSError as error:
            raise DeployError(
                f"the controller cannot be reached at {host} port {port}: {error.strerror or error}. "
                "Agents need both of its ports; the token has the addresses of `controller init --address`"
            ) from None


def encode(said: dict[str, Any]) -> str:
    """The token that says this."""
    return base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode()
