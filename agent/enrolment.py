"""Joining a controller with a one-time token: from the token to the files with which `run` starts."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import ssl
from datetime import UTC, datetime, timedelta

import msgspec
from msgspec import Struct

from agent.config import AgentConfig, encode, load
from agent.https import HttpsClient, pinned_context, split_api, unverified_context
from common import keys
from common.clock import Clock
from common.errors import Conflict, DeadlinePassed, Forbidden, InvalidRequest, Unavailable
from common.names import check_node_name

_HASH = re.compile(r"[0-9a-f]{64}")
_LINK = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}")
_KEY = re.compile(r"[!-~]{40}")
CLOCK_ERROR = timedelta(days=2)
"""By how much a host's clock may be wrong, so that it can still join."""
MAX_TOKEN = 8192


class Token(Struct, frozen=True):
    """What an invitation says: where the controller is, what proves that it is the one, and the right to join once.

    `ca` is the sha256 of the CA certificate's DER form in hexadecimal, `key` the controller's CURVE key in Z85.
    """

    v: int
    api: str
    link: str
    ca: str
    key: str
    secret: str
    expires: datetime
    node: str | None = None


class _Joined(Struct):
    node: str


class _Envelope(Struct):
    metadata: _Joined


def read_token(text: str) -> Token:
    """Read a token. Raises InvalidRequest when it is damaged or of another version."""
    compact = "".join(text.split())
    try:
        if len(compact) > MAX_TOKEN:
            raise InvalidRequest("the token is too long", field="token")
        plain = base64.b64decode(compact + "=" * (-len(compact) % 4), altchars=b"-_", validate=True)
        token = msgspec.json.decode(plain, type=Token)
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        raise InvalidRequest("the token is damaged: copy all of it, as it was printed", field="token") from None
    if token.v != 1:
        raise InvalidRequest(f"the token is of version {token.v}: this agent knows version 1", field="token")
    split_api(token.api)
    whole = _LINK.fullmatch(token.link) and _HASH.fullmatch(token.ca) and _KEY.fullmatch(token.key)
    if not whole or not token.secret or token.expires.tzinfo is None:
        raise InvalidRequest("the token is damaged: a field of it is not what it should be", field="token")
    if token.node is not None:
        check_node_name(token.node)
    return token


async def join(text: str, config: AgentConfig, clock: Clock) -> AgentConfig:
    """Enrol this host and write its files into `config.state`; the settings with which it was enrolled.

    `config.node` may be empty: then the token or the controller names the node. A second time with the same
    controller changes nothing. Raises InvalidRequest (token), DeadlinePassed (token expired), Conflict (enrolled
    elsewhere), Unavailable (controller out of reach), Forbidden (not the controller that the token names), or what the
    controller answered.
    """
    token = read_token(text)
    if token.node and config.node and token.node != config.node:
        raise Conflict(f"the token is for node {token.node}, not for {config.node}")
    if (config.state / "agent.json").exists():
        return _joined_before(token, config)
    # The controller decides; this host's own clock may be wrong.
    if token.expires + CLOCK_ERROR <= clock.now().astimezone(UTC):
        raise DeadlinePassed(f"the token expired at {token.expires.isoformat()}: ask the controller for a new one")
    config.state.mkdir(mode=0o711, parents=True, exist_ok=True)
    config.state.chmod(0o711)
    pair = keys.load_or_create(config.state / "agent.key")
    ca_pem = await _fetch_ca(token)
    node = await _enrol(token, config.node or token.node, pair.public, ca_pem)
    keys.write_private(config.state / "ca.crt", ca_pem)
    keys.write_private(config.state / "controller.pub", token.key + "\n")
    enrolled = msgspec.structs.replace(config, node=node, controller=token.link, api=token.api.rstrip("/"))
    # Last, because its presence says that the host is enrolled.
    keys.write_private(config.state / "agent.json", encode(enrolled))
    return enrolled


def _joined_before(token: Token, config: AgentConfig) -> AgentConfig:
    present = load(config.state / "agent.json")
    key = (config.state / "controller.pub").read_text(encoding="ascii").strip()
    wanted = config.node or token.node
    if key != token.key or (wanted and wanted != present.node):
        raise Conflict(f"{config.state} is enrolled as node {present.node} of {present.api} already: purge it first")
    return present


async def _fetch_ca(token: Token) -> str:
    """The controller's CA certificate, from whoever answers: its hash in the token tells whether it is the one."""
    client = HttpsClient(token.api, unverified_context())
    try:
        body = await client.fetch("GET", "/1.0/ca", limit=64 * 1024)
    finally:
        client.close()
    try:
        der = ssl.PEM_cert_to_DER_cert(body.decode("ascii").strip())
    except ValueError:
        raise Forbidden(f"{token.api} gave no certificate: it is not the controller that the token names") from None
    if hashlib.sha256(der).hexdigest() != token.ca:
        raise Forbidden(f"{token.api} is not the controller that the token names: its certificate is another one")
    return ssl.DER_cert_to_PEM_cert(der)


async def _enrol(token: Token, node: str | None, public_key: str, ca_pem: str) -> str:
    """Use the token up; the node's name as the controller knows it."""
    body = msgspec.json.encode({"secret": token.secret, "node": node, "public_key": public_key})
    client = HttpsClient(token.api, pinned_context(ca_pem))
    try:
        answer = await client.fetch("POST", "/1.0/agents", body)
    finally:
        client.close()
    try:
        name = msgspec.json.decode(answer, type=_Envelope).metadata.node
    except msgspec.MsgspecError:
        raise Unavailable(f"{token.api} gave an answer that is not understood") from None
    return check_node_name(name)
