"""Who calls, and what it may do: bearer tokens, roles, rights."""

from __future__ import annotations

from enum import IntEnum

from tornado.httputil import HTTPServerRequest

from common.errors import Forbidden, Unauthorized
from controller.services.caller import Caller
from controller.services.identities import Identities


class Right(IntEnum):
    """What a caller must be allowed to do; a role has all rights up to its own."""

    PUBLIC = 0
    READ = 1
    OPERATE = 2
    ADMIN = 3


ROLES = {"viewer": Right.READ, "operator": Right.OPERATE, "admin": Right.ADMIN}


def bearer(request: HTTPServerRequest) -> str:
    """The bearer token of a request; empty when there is none."""
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""


async def authenticate(request: HTTPServerRequest, identities: Identities, request_id: str) -> Caller | None:
    """The caller whose token comes with the request; None for anybody else."""
    text = bearer(request)
    token = await identities.find(text) if text else None
    if token is None:
        return None
    return Caller(token.name, token.role, "tls", request.remote_ip or "", request_id)


def authorize(caller: Caller | None, right: Right) -> None:
    """Raise Unauthorized or Forbidden unless the caller has the right."""
    if right is Right.PUBLIC:
        return
    if caller is None:
        raise Unauthorized("a token is needed: Authorization: Bearer <token>")
    if ROLES.get(caller.role, Right.PUBLIC) < right:
        raise Forbidden(f"the role {caller.role} may not do this", allowed=right.name.lower())
