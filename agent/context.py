"""Which command a task works on: for the logs of everything that it calls, drivers included."""

from __future__ import annotations

import logging
from contextvars import ContextVar

current_command: ContextVar[str] = ContextVar("current_command", default="")
current_request: ContextVar[str] = ContextVar("current_request", default="")


class CommandFilter(logging.Filter):
    """Adds the command's and the REST call's id to every record logged on their behalf."""

    def filter(self, record: logging.LogRecord) -> bool:
        command, request = current_command.get(), current_request.get()
        if command and not hasattr(record, "command"):
            record.command = command
        if request and not hasattr(record, "request"):
            record.request = request
        return True
