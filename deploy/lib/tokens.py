"""Join tokens: URL-safe base64 of a JSON object, without padding."""

from __future__ import annotations

import base64
import json
from typing import Any

from deploy.lib.console import DeployError


def decode(token: str) -> dict[str, Any]:
    """What a token says. Raises DeployError when it is none."""
    try:
        said = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except ValueError:
        said = None
    if not isinstance(said, dict) or not {"api", "link", "secret"} <= said.keys():
        raise DeployError("this is no join token: POST /1.0/nodes on the controller gives one; copy all of it")
    return said


def encode(said: dict[str, Any]) -> str:
    """The token that says this."""
    return base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode()
