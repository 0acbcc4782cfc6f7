"""Logs as JSON lines: control characters escaped, values of secrets never written."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET = ("token", "secret", "password", "authorization", "environment.")


def redact(value: Any, name: str = "") -> Any:
    """A copy without the values of secrets: what a key such as `token` or `environment.X` names becomes `***`."""
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    return "***" if any(mark in name.lower() for mark in _SECRET) else value


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what is passed as `extra` stands as fields of its own."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update({key: redact(item, key) for key, item in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up(level: str = "info") -> None:
    """Send all logs to standard error as JSON lines. `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These print message bodies and every SQL or protocol detail at debug.
    for noisy in ("zmq", "sqlalchemy", "alembic", "asyncio", "tornado.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
