"""When snapshots are taken, what they are called and when they expire: the configuration keys snapshots.*."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.names import check_snapshot_name
from common.options import check_config as check_table
from common.snapshots import ALIASES, check_pattern, expiry_of, given_expiry, name_of
from controller.cron import check_schedule, last_moment
from controller.services.configuration import check_config

PROFILE = settings(max_examples=300, deadline=None, database=None)
MOMENTS = st.datetimes(datetime(1970, 1, 1), datetime(3000, 1, 1)).map(lambda moment: moment.replace(tzinfo=UTC))
NUMBERS = st.integers(1, 9999)
NOON = datetime(2026, 3, 14, 12, 0, 30, tzinfo=UTC)


def expiry(text: str, moment: datetime = NOON) -> datetime | None:
    return expiry_of(text, moment, "config.snapshots.expiry")


# ---------------------------------------------------------------- expiry


@PROFILE
@given(MOMENTS, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_spans_of_fixed_length_add_up(moment: datetime, minutes: int, hours: int, days: int, weeks: int) -> None:
    wanted = moment + timedelta(minutes=minutes, hours=hours, days=days, weeks=weeks)
    assert expiry(f"{minutes}M {hours}H {days}d {weeks}w", moment) == wanted
    assert expiry(f"{weeks}w {minutes}M {days}d {hours}H", moment) == wanted


@PROFILE
@given(MOMENTS, st.integers(1, 5000), st.integers(1, 4000))
def test_months_and_years_go_by_the_calendar(moment: datetime, months: int, years: int) -> None:
    found = expiry(f"{months}m {years}y", moment)
    assert found is not None
    count = moment.year * 12 + moment.month - 1 + years * 12 + months
    year, month = count // 12, count % 12 + 1
    days = calendar.monthrange(year, month)[1]
    if moment.day <= days:
        assert (found.year, found.month, found.day) == (year, month, moment.day)
    else:  # 31 January and one month is 3 March: as LXD (Go's AddDate) counts
        assert (found.month, found.day) == (month % 12 + 1, moment.day - days)
    assert found.timetz() == moment.timetz()
    assert expiry(f"{years}y {months}m", moment) == found > moment


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "d",
        "1d 1d",
        "0d",
        "-1d",
        "1.5d",
        "1D",
        "10000d",
        "1d,2H",
        "1dd",
        "1 d",
        "٣d",
        "9999y",
        "1d\n2H",
        "1d\n",
        "1d\t2H",
    ],
)
def test_what_is_no_expiry(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_config({"snapshots.expiry": text})
    assert caught.value.field == "config.snapshots.expiry"
    assert "2w 3d" in (caught.value.allowed or "")


def test_the_longest_that_is_let_through_is_in_the_calendar_for_ever() -> None:
    for text in ("6999y 9999m 9999w 9999d", "1M 2H 3d 4w 5m 6y", "", " "):
        try:
            check_config({"snapshots.expiry": text})
        except InvalidRequest:
            continue
        expiry(text, datetime(2999, 1, 1, tzinfo=UTC))
    assert expiry("1M 2H 3d 4w 5m 6y") == datetime(2032, 9, 14, 14, 1, 30, tzinfo=UTC)


def test_lxds_zero_time_is_never() -> None:
    assert given_expiry(None) is None
    assert given_expiry(datetime(1, 1, 1, tzinfo=UTC)) is None
    assert given_expiry(datetime.fromisoformat("0001-01-01T00:00:00+05:00")) is None
    east = datetime.fromisoformat("2030-01-01T02:00:00+02:00")
    assert given_expiry(east) == datetime(2030, 1, 1, tzinfo=UTC)
    with pytest.raises(InvalidRequest):
        given_expiry(datetime.fromisoformat("9999-12-31T23:59:59-05:00"))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("pattern", "taken", "name"),
    [
        ("", [], "snap0"),
        ("snap%d", ["snap0", "snap7", "snap", "snapx", "snap1x", "a"], "snap8"),
        ("snap%d", ["snap999999999999999"], "snap0"),
        ("%d-daily", ["9-daily", "10-daily", "11"], "11-daily"),
        ("nightly", ["other"], "nightly"),
        ("nightly", ["nightly", "nightly-3"], "nightly-4"),
        ("{{ creation_date|date:'2006-01-02_15-04-05' }}", [], "2026-03-14_12-00-30"),
        ('{{creation_date|date:"20060102T1504"}}-%d', ["20260314T1200-0"], "20260314T1200-1"),
        ("x{{ creation_date|date:'06' }}", ["x26"], "x26-0"),
    ],
)
def test_names(pattern: str, taken: list[str], name: str) -> None:
    check_config({"snapshots.pattern": pattern})
    assert name_of(pattern, NOON, taken, "field") == name


@pytest.mark.parametrize(
    "pattern",
    [
        "a/b", "a b", "..", "*", "\\", "%d%d", "-%d", "snap%s", "{{ creation_date }}", "{{ name }}%d", "{% now %}",
        "{{ creation_date|date:'Mon' }}", "{{ creation_date|date:'' }}", "{{ creation_date|date:'2006 01' }}",
        "x" * 60 + "%d", "x" * 60, "x" * 300, "a\nb",
        "{{ creation_date|date:'2006' }}\n", "{{ creation_date|date:'2006' }", "%", "é%d",
    ],
)  # fmt: skip
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_config({"snapshots.pattern": pattern})
    assert caught.value.field == "config.snapshots.pattern"
    assert caught.value.allowed


@PROFILE
@given(
    st.text("snap%d-_.{}creation_date|:'2006 ", max_size=30) | st.text(max_size=70),
    st.lists(st.from_regex(r"[a-z0-9]{1,4}[0-9-]{0,10}", fullmatch=True)),
    MOMENTS,
)
def test_whatever_passes_gives_names_that_nothing_has(pattern: str, taken: list[str], moment: datetime) -> None:
    try:
        check_pattern(pattern, "field")
    except InvalidRequest:
        return
    for _ in range(3):
        name = name_of(pattern, moment, taken, "field")
        assert check_snapshot_name(name) not in taken
        taken.append(name)


# ---------------------------------------------------------------- schedules


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}:00+00:00")


@pytest.mark.parametrize(
    ("schedule", "after", "until", "moment"),
    [
        ("@hourly", "2026-03-14T11:59", "2026-03-14T12:00", "2026-03-14T12:00"),
        ("@hourly", "2026-03-14T12:00", "2026-03-14T12:10", None),
        ("@hourly", "2026-03-14T12:00", "2026-03-14T15:10", "2026-03-14T15:00"),
        ("@daily", "2026-03-13T23:59", "2026-03-14T00:00", "2026-03-14T00:00"),
        ("@midnight", "2026-03-14T00:00", "2026-03-14T00:01", None),
        ("@weekly", "2026-03-14T23:55", "2026-03-15T00:00", "2026-03-15T00:00"),  # a Sunday
        ("@monthly", "2026-03-31T23:55", "2026-04-01T00:00", "2026-04-01T00:00"),
        ("@yearly", "2026-12-31T23:55", "2027-01-01T00:04", "2027-01-01T00:00"),
        ("@annually, @hourly", "2026-03-14T11:59", "2026-03-14T12:00", "2026-03-14T12:00"),
        ("*/15 9-17 * * mon-fri", "2026-03-13T17:40", "2026-03-13T18:00", "2026-03-13T17:45"),
        ("*/15 9-17 * * mon-fri", "2026-03-14T11:50", "2026-03-14T12:00", None),
        ("0 0 13 * FRI", "2026-03-13T23:55", "2026-03-20T00:00", "2026-03-20T00:00"),  # either, as cron has it
        ("0 2 29 2 *", "2028-02-29T01:59", "2028-02-29T02:00", "2028-02-29T02:00"),
        ("", "2026-03-14T11:59", "2026-03-14T12:00", None),
    ],
)
def test_moments(schedule: str, after: str, until: str, moment: str | None) -> None:
    check_schedule(schedule)
    found = last_moment(schedule, at(after), at(until))
    assert found == (None if moment is None else at(moment))


@pytest.mark.parametrize(
    "schedule",
    [
        "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "*/0 * * * *",
        "5-1 * * * *", "0 0 30 2 *", "0 0 31 4,6 *", "@startup", "@never", "@hourly,", "@hourly * * * *", "hourly",
        "* * * * *\n",
        "* * * * * \u2028", "*\t* * * *", "1 " * 300, "@hourly," * 60 + "@daily", "a b c d e",
        "* * * * 5L/2", "1;2 * * * *",
    ],
)  # fmt: skip
def test_what_is_no_schedule(schedule: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_config({"snapshots.schedule": schedule})
    assert caught.value.field == "config.snapshots.schedule"
    assert "@hourly" in (caught.value.allowed or "")


@PROFILE
@given(st.text("0123456789*/,-#LW MONFRISUN@", max_size=24) | st.sampled_from(list(ALIASES)))
def test_whatever_passes_has_moments(schedule: str) -> None:
    try:
        check_config({"snapshots.schedule": schedule})
    except InvalidRequest:
        return
    check_table({"snapshots.schedule": schedule})  # the node's own check is not stricter
    last_moment(schedule, at("2026-03-14T11:50"), at("2026-03-14T12:00"))


@PROFILE
@given(
    st.sampled_from(["@hourly", "*/7 * * * *", "@daily,@hourly", "5 */3 * * 1-5"]),
    MOMENTS,
    st.lists(st.integers(1, 5000)),
)
def test_no_moment_comes_twice_or_is_lost(schedule: str, begin: datetime, steps: list[int]) -> None:
    """However the time is cut into pieces: of each piece the last moment, of all of them the last of all."""
    found, end = [], begin
    for minutes in steps:
        moment = last_moment(schedule, end, end + timedelta(minutes=minutes))
        end += timedelta(minutes=minutes)
        if moment is not None:
            found.append(moment)
    assert found == sorted(set(found))
    assert last_moment(schedule, begin, end) == (found[-1] if found else None)
