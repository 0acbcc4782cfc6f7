"""Sizes and shares: what is printed is what the API document writes, and is read again as the same."""

from __future__ import annotations

import contextlib
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.units import MAX_SIZE, format_percent, format_size, parse_percent, parse_size

PROFILE = settings(max_examples=300, deadline=None, database=None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("7B", 7),
        ("7 bytes", 7),
        ("5GB", 5 * 10**9),
        ("3kB", 3000),
        ("512MiB", 512 * 2**20),
        ("1EiB", 2**60),
        ("007kB", 7000),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 5GB",
        "5GB ",
        "5 GB",
        "-1",
        "+1",
        "1.5GB",
        "5gb",
        "5G",
        "5Gb",
        "5KB",
        "1e3",
        "٣GB",
        "5GB\n",
        "10EiB",
        "9" * 21,
        "5 bytes ",
        "0x10",
        "5bytes",
        "NaN",
        "GB",
        "5\x00B",
    ],
)
def test_other_sizes_are_refused_with_the_field_and_the_rule(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_size(text, "config.limits.memory")
    assert caught.value.field == "config.limits.memory"
    assert caught.value.allowed


@PROFILE
@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert 0 <= parse_size(text, "x") <= MAX_SIZE


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1kB"),
        (5 * 10**9, "5GB"),
        (1_500_000, "1.5MB"),
        (1_255_000, "1.26MB"),
        (999_994, "999.99kB"),
        (999_995, "1MB"),
        (999_999, "1MB"),
        (2**63 - 1, "9.22EB"),
    ],
)
def test_sizes_are_printed(size: int, text: str) -> None:
    assert format_size(size) == text


@PROFILE
@given(st.integers(0, MAX_SIZE))
def test_a_printed_size_is_right_to_two_decimals_of_the_largest_fitting_unit(size: int) -> None:
    text = format_size(size)
    number = text.rstrip("BkMGTPE")
    unit = text[len(number) :]
    factor = 1000 ** ["B", "kB", "MB", "GB", "TB", "PB", "EB"].index(unit)
    assert abs(Decimal(number) * factor - size) <= Decimal(factor) / 200
    assert Decimal(number) < 1000 or unit == "EB"
    assert Decimal(number) >= 1 or size == 0
    assert not ("." in number and number.endswith("0")), "no trailing zeros"
    assert len(number.partition(".")[2]) <= 2
    if "." not in number:
        assert abs(parse_size(text, "x") - size) <= factor // 200


def test_negative_sizes_are_a_fault() -> None:
    with pytest.raises(ValueError, match="negative"):
        format_size(-1)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.2, "20%"),
        (1, "100%"),
        (0.0, "0%"),
        (-0.0, "0%"),
        (0.12345, "12.35%"),
        (0.1, "10%"),
        (1e-7, "0%"),
        (0.00005, "0.01%"),
        (2.5, "250%"),
    ],
)
def test_shares_are_printed(share: float, text: str) -> None:
    assert format_percent(share) == text


@PROFILE
@given(st.floats(0, 1000))
def test_a_printed_share_is_right_to_two_decimals(share: float) -> None:
    text = format_percent(share)
    assert text.endswith("%")
    assert abs(Decimal(text[:-1]) - Decimal(share) * 100) <= Decimal("0.0051")
    assert not ("." in text and text.endswith("0%"))


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_shares_that_cannot_be_are_a_fault(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        format_percent(share)


@pytest.mark.parametrize(("text", "share"), [("1%", 1), ("100%", 100), ("020%", 20), ("5GB", None), ("", None)])
def test_percentages_are_read(text: str, share: int | None) -> None:
    assert parse_percent(text, "x") == share


@pytest.mark.parametrize("text", ["0%", "101%", "999%"])
def test_percentages_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_percent(text, "x")
