"""Checks of a container's configuration before anything has happened: what is in the table, and schedules."""

from __future__ import annotations

from collections.abc import Mapping

from common import options
from controller import cron


def check_config(config: Mapping[str, str], field: str = "config") -> None:
    """Raise InvalidRequest for unknown keys and values out of range, naming `config.<key>` and what is allowed."""
    options.check_config(config, field)
    cron.check_schedule(config.get(cron.KEY, ""), f"{field}.{cron.KEY}")
