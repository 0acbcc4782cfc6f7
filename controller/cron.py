"""When a schedule of snapshots comes due. Pure; cronsim reads the cron expressions, as Debian's cron does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cronsim import CronSim, CronSimError

from common.errors import InvalidRequest
from common.snapshots import SCHEDULE_RULE, expressions

KEY = "snapshots.schedule"


def check_schedule(schedule: str, field: str = f"config.{KEY}") -> None:
    """Raise InvalidRequest for a schedule that cannot be read, or whose moment never comes (30 February)."""
    for expression in expressions(schedule, field):
        try:
            next(CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC)))
        except CronSimError as error:
            raise _invalid(error, field) from None
        except StopIteration:
            raise InvalidRequest(
                "the moment of this schedule never comes", field=field, allowed=SCHEDULE_RULE
            ) from None


def last_moment(schedule: str, after: datetime, until: datetime) -> datetime | None:
    """The last moment of a schedule later than `after` and not later than `until`, both in UTC; None: none.

    Raises InvalidRequest for a schedule that cannot be read.
    """
    moments, behind = [], until.replace(microsecond=0) + timedelta(seconds=1)
    for expression in expressions(schedule, KEY):
        try:
            moments.append(next(CronSim(expression, behind, reverse=True)))
        except StopIteration:
            continue
        except CronSimError as error:
            raise _invalid(error) from None
    last = max(moments, default=after)
    return last if last > after else None


def _invalid(error: CronSimError, field: str = KEY) -> InvalidRequest:
    return InvalidRequest(f"invalid schedule: {error}", field=field, allowed=SCHEDULE_RULE)
