"""Errors to HTTP: one table, one envelope."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from common import errors
from common.errors import InvalidRequest, VzfleetError

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
    errors.Stale: 409,
    errors.Unsupported: 400,
    errors.DriverFailed: 500,
    errors.Internal: 500,
    errors.VzfleetError: 500,
}


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


_AT = re.compile(r"^(?P<text>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)
_EXPECTED = re.compile(r"Expected `(?P<what>[^`]*)`(?P<rest>.*)", re.DOTALL)


def from_validation(error: msgspec.ValidationError, kind: Any) -> InvalidRequest:
    """An InvalidRequest that names the field's path and what is allowed, from msgspec's own words."""
    match = _AT.match(str(error))
    text, path = (match["text"], match["path"] or "$") if match else (str(error), "$")
    field = path.removeprefix("$").removeprefix(".")
    if unknown := _UNKNOWN.match(text):
        name = ".".join(part for part in (field, unknown["name"][:160]) if part)
        return InvalidRequest(f"unknown field {name!r}", field=name, allowed=_fields_of(kind, field))
    if missing := _MISSING.match(text):
        name = ".".join(part for part in (field, missing["name"]) if part)
        return InvalidRequest(f"the field {name!r} is missing", field=name, allowed="it is required")
    allowed = _choices_of(kind, field)
    expected = _EXPECTED.match(text)
    if allowed is None and expected is not None:
        allowed = expected["what"].replace(" | null", "")
        allowed += expected["rest"].split(", got")[0] if ", got" not in expected["rest"][:6] else ""
    return InvalidRequest(f"{field or 'body'}: {text[:300]}", field=field or "body", allowed=allowed)


def _fields_of(kind: Any, path: str) -> str | None:
    found = _type_at(kind, path)
    return ", ".join(field.encode_name for field in msgspec.structs.fields(found)) if _is_struct(found) else None


def _choices_of(kind: Any, path: str) -> str | None:
    """The values of an enumeration or the tags of a union at a path, in words."""
    parent, _, name = path.rpartition(".")
    owner = _type_at(kind, parent)
    if owner is None:
        return None
    members = getattr(owner, "__args__", (owner,))
    tags = [member.__struct_config__.tag for member in members if _is_struct(member)]
    if name and any(
        getattr(member, "__struct_config__", None) and member.__struct_config__.tag_field == name for member in members
    ):
        return ", ".join(str(tag) for tag in tags)
    for member in members:
        if not _is_struct(member):
            continue
        for field in msgspec.structs.fields(member):
            choices = getattr(field.type, "__args__", ())
            if field.encode_name == name and choices and all(isinstance(choice, str) for choice in choices):
                return ", ".join(choices)
    return None


def _type_at(kind: Any, path: str) -> Any:
    for name in [part for part in path.split(".") if part]:
        fields = msgspec.structs.fields(kind) if _is_struct(kind) else ()
        kind = next((field.type for field in fields if field.encode_name == name), None)
        if kind is None:
            return None
    return kind


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
