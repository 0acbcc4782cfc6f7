"""Errors to HTTP: one table, one envelope."""

from __future__ import annotations

from typing import Any

from common import errors
from common.errors import VzfleetError

HTTP_STATUS: dict[type[VzfleetError], int] = {
    errors.InvalidRequest: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.PreconditionFailed: 412,
    errors.TooLarge: 413,
    errors.TooMany: 429,
    errors.Unavailable: 503,
    errors.NoSpace: 507,
    errors.DeadlinePassed: 503,
    errors.Cancelled: 409,
    errors.Abandoned: 409,
    errors.Stale: 409,
    errors.Unsupported: 400,
    errors.DriverFailed: 500,
    errors.Internal: 500,
    errors.VzfleetError: 500,
}

CODES = {400: "invalid", 401: "unauthorized", 404: "not-found", 405: "method-not-allowed", 413: "too-large"}
"""`metadata.code` of what the HTTP server itself refuses, by HTTP code."""


def http_status(error: VzfleetError) -> int:
    """The HTTP code of an error: its own class's, else its parent's."""
    return next(HTTP_STATUS[kind] for kind in type(error).__mro__ if kind in HTTP_STATUS)


def error_envelope(code: int, text: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The body of every error (the document's shape with all fields of rule R1)."""
    return {
        "type": "error",
        "status": "",
        "status_code": 0,
        "operation": "",
        "error_code": code,
        "error": text,
        "metadata": metadata,
    }


def describe(error: VzfleetError) -> dict[str, Any]:
    """`metadata` of an error: code, field and allowed as far as they apply, and what its class adds."""
    facts = {"code": error.code, "field": error.field, "allowed": error.allowed, **error.details}
    return {key: value for key, value in facts.items() if value is not None}
