"""The text that a new host is given to join: where the controller is, how to know it, and a secret good for one use."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from common.clock import timestamp
from common.errors import InvalidRequest

MAX_TEXT = 4096
SECRET_BYTES = 32
_NODE = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"


class JoinToken(Struct, frozen=True, forbid_unknown_fields=True, rename={"version": "v"}):
    """What a join token says. Its holder may enrol one node until `expires` (RFC 3339, UTC).

    `api` is `https://HOST:PORT`, `link` `tcp://HOST:PORT`; `ca` is the sha256 of the DER of the controller's CA
    certificate in hexadecimal, `key` its CURVE public key (Z85); `node` the only name that may be taken, None for any.
    """

    api: Annotated[str, Meta(pattern=r"^https://[!-~]{1,255}\Z")]
    link: Annotated[str, Meta(pattern=r"^tcp://[!-~]{1,255}\Z")]
    ca: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    key: Annotated[str, Meta(pattern=r"^[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")]
    node: Annotated[str, Meta(pattern=_NODE)] | None
    secret: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{43}\Z")]
    expires: datetime
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        if self.expires.tzinfo is None:
            raise ValueError("expires must name its time zone")

    def __repr__(self) -> str:
        return f"JoinToken(node={self.node!r}, link={self.link!r}, expires={self.expires})"


def encode(token: JoinToken) -> str:
    """The token as one word of URL-safe base64 without padding."""
    plain = {"v": token.version} | msgspec.structs.asdict(token) | {"expires": timestamp(token.expires)}
    del plain["version"]
    return base64.urlsafe_b64encode(msgspec.json.encode(plain)).rstrip(b"=").decode()


def decode(text: str) -> JoinToken:
    """The token that a text holds. Raises InvalidRequest when it is none; whether it has expired is not asked."""
    word = text.strip()
    try:
        if len(word) > MAX_TEXT:
            raise ValueError("too long")
        packed = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(packed, type=JoinToken)
    except (ValueError, binascii.Error, msgspec.DecodeError):
        # The reason could show a part of the secret.
        raise InvalidRequest(
            "this is not a join token", field="token", allowed="a word that the controller printed"
        ) from None


def new_secret() -> str:
    """A new secret: 256 random bits in 43 characters."""
    return secrets.token_urlsafe(SECRET_BYTES)


def hash_secret(secret: str) -> str:
    """What is stored of a secret: its sha256 in hexadecimal. A random secret needs no salt and no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()
