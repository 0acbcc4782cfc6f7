"""ETags: hashes of what can be written of a thing, by which a change can be refused that knows an older revision."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from common.errors import PreconditionFailed


def digest(written: Any) -> str:
    """The ETag of what can be written, unquoted (R8)."""
    return hashlib.sha256(msgspec.json.encode(written)).hexdigest()


def require_match(etag: str, expected: str | None, what: str) -> None:
    """Raise PreconditionFailed unless `expected` (an If-Match header, its tags quoted or not) has this ETag."""
    if expected is None or expected.strip() == "*":
        return
    tags = {tag.strip().removeprefix("W/").strip('"') for tag in expected.split(",")}
    if etag not in tags:
        raise PreconditionFailed(f"the {what} was changed meanwhile: GET it again", field="If-Match")
