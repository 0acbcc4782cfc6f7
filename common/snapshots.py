"""The rules of the configuration keys snapshots.*: when snapshots are taken, what they are called, when they expire.

All times are UTC. What only the controller decides with a library (that a cron expression has a next moment) is in
`controller/cron.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from common.errors import InvalidRequest
from common.names import check_snapshot_name

DEFAULT_PATTERN = "snap%d"
ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@annually": "0 0 1 1 *",
    "@yearly": "0 0 1 1 *",
}
"""LXD's names for schedules. Its @startup is none for a fleet: containers are started by operations."""
SCHEDULE_RULE = (
    f"minute hour day month weekday (cron), or {', '.join(ALIASES)}, or several of these with commas between"
)
EXPIRY_RULE = "numbers (1 to 9999) with M (minutes), H, d, w, m (months) or y, each once: 2w 3d"
PATTERN_RULE = (
    "the name of a snapshot, with at most one %d and "
    "{{ creation_date|date:'2006-01-02_15-04-05' }} (any of 2006 06 01 02 15 04 05, and - . _ T)"
)
_LONGEST = 256
_CRON = re.compile(r"[0-9A-Za-z*/,#-]+(?: +[0-9A-Za-z*/,#-]+){4}")
_SPAN = re.compile(r"([1-9][0-9]{0,3})([MHdwmy])")
_DATE = re.compile(r"\{\{ *creation_date *\| *date: *(?:'([^'{}]*)'|\"([^\"{}]*)\") *\}\}")
_LAYOUT = re.compile(r"2006|06|01|02|15|04|05|[-._T]")
# Go's reference time (LXD formats dates by it) in the terms of strftime.
_TERMS = {"2006": "%Y", "06": "%y", "01": "%m", "02": "%d", "15": "%H", "04": "%M", "05": "%S"}
_NUMBER = re.compile(r"[0-9]{1,9}")
_NEVER_BEFORE = datetime(2, 1, 1, tzinfo=UTC)


# ---------------------------------------------------------------- snapshots.schedule


def expressions(schedule: str, field: str) -> list[str]:
    """The cron expressions of five fields that a schedule stands for; none when it is empty.

    Raises InvalidRequest for what is neither such expression nor known aliases.
    """
    text = schedule.strip(" ")
    if not text:
        return []
    if text.startswith("@"):
        names = [name.strip(" ") for name in text.split(",")]
        unknown = [name for name in names if name not in ALIASES]
        if not unknown and len(text) <= _LONGEST:
            return [ALIASES[name] for name in names]
    elif len(text) <= _LONGEST and _CRON.fullmatch(text):
        return [text]
    raise InvalidRequest(f"invalid schedule {text[:80]!r}", field=field, allowed=SCHEDULE_RULE)


# ---------------------------------------------------------------- snapshots.expiry


def expiry_of(text: str, moment: datetime, field: str) -> datetime | None:
    """When what is made at `moment` expires; None (never) for an empty rule. Raises InvalidRequest naming `field`.

    Months and years are counted as LXD counts them: a day that the month does not have is one of the next month.
    """
    if not text.strip(" "):
        return None
    spans: dict[str, int] = {}
    for word in re.split(" +", text.strip(" ")):
        match = _SPAN.fullmatch(word)
        if match is None or match[2] in spans:
            raise InvalidRequest(f"invalid expiry {text[:80]!r}", field=field, allowed=EXPIRY_RULE)
        spans[match[2]] = int(match[1])
    months = moment.month - 1 + spans.get("m", 0)
    year = moment.year + spans.get("y", 0) + months // 12
    rest = timedelta(
        days=moment.day - 1 + spans.get("d", 0) + 7 * spans.get("w", 0),
        hours=spans.get("H", 0),
        minutes=spans.get("M", 0),
    )
    try:
        return moment.replace(year=year, month=months % 12 + 1, day=1) + rest
    except (ValueError, OverflowError):
        raise InvalidRequest(f"expiry {text[:80]!r} is in no calendar", field=field, allowed=EXPIRY_RULE) from None


def check_expiry(text: str, field: str) -> None:
    """Raise InvalidRequest for what is no rule of expiry, or leads out of the calendar."""
    expiry_of(text, datetime(2999, 12, 31, tzinfo=UTC), field)


def given_expiry(moment: datetime | None) -> datetime | None:
    """The expiry that a client gave, in UTC; None for never, which LXD's clients spell 0001-01-01T00:00:00Z."""
    if moment is None or moment.replace(tzinfo=UTC) < _NEVER_BEFORE:
        return None
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest("a time in no calendar", field="expires_at", allowed="a time in RFC 3339") from None


# ---------------------------------------------------------------- snapshots.pattern


def name_of(pattern: str, moment: datetime, taken: Collection[str], field: str) -> str:
    """What a snapshot taken at `moment` is called. Raises InvalidRequest when that is no name.

    `%d` becomes a number greater than any that another snapshot has there, from 0; without `%d` a name that is
    taken gets `-0`, `-1` and so on.
    """
    base = _DATE.sub(lambda match: _date(match[1] or match[2] or "", moment, field), pattern or DEFAULT_PATTERN)
    if "{" in base or "}" in base:
        raise InvalidRequest(f"invalid pattern {pattern[:80]!r}", field=field, allowed=PATTERN_RULE)
    if base.count("%d") > 1:
        raise InvalidRequest("a pattern has %d at most once", field=field, allowed=PATTERN_RULE)
    if "%d" not in base and base in taken:
        base += "-%d"
    if "%d" not in base:
        return check_snapshot_name(base, field)
    before, _, after = base.partition("%d")
    numbers = (name[len(before) : len(name) - len(after)] for name in taken if _between(name, before, after))
    number = max((int(number) for number in numbers if _NUMBER.fullmatch(number)), default=-1) + 1
    return check_snapshot_name(f"{before}{number}{after}", field)


def _between(name: str, before: str, after: str) -> bool:
    return len(name) > len(before) + len(after) and name.startswith(before) and name.endswith(after)


def _date(layout: str, moment: datetime, field: str) -> str:
    terms = _LAYOUT.findall(layout)
    if "".join(terms) != layout or not layout:
        raise InvalidRequest(f"invalid date layout {layout[:80]!r}", field=field, allowed=PATTERN_RULE)
    return moment.strftime("".join(_TERMS.get(term, term) for term in terms))


def check_pattern(text: str, field: str) -> None:
    """Raise InvalidRequest for a pattern that leads to no name of a snapshot."""
    if len(text) > _LONGEST:
        raise InvalidRequest("the pattern is too long", field=field, allowed=PATTERN_RULE)
    sample = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)
    first = name_of(text, sample, (), field)
    # A number of nine digits must fit, too: in place of %d, or behind a name that is taken.
    longest = len(first) + (8 if "%d" in text or not text else 10)
    if longest > 64:
        raise InvalidRequest("its names would be too long", field=field, allowed=PATTERN_RULE)
