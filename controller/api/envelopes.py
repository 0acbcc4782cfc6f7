"""The envelopes of what went well (R1 with the document's spelling of `status`); `errors.py` has that of errors."""

from __future__ import annotations

from typing import Any

import orjson


def sync_envelope(metadata: bytes) -> bytes:
    """A sync answer around JSON that is ready."""
    head = b'{"type":"sync","status":"success","status_code":200,"operation":"","error_code":0,"error":"","metadata":'
    return head + metadata + b"}"


def async_envelope(url: str, resources: dict[str, list[str]], view: dict[str, Any]) -> bytes:
    """The answer to what was accepted (R3): where its operation is, what it is about, and the operation itself."""
    return orjson.dumps(
        {
            "type": "async",
            "status": "ok",
            "status_code": 100,
            "operation": url,
            "error_code": 0,
            "error": "",
            "resources": resources,
            "metadata": view,
        }
    )
