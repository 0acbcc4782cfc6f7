"""The configuration table: everything it lets through can be parsed, stands in one line and fits into a message."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import codec
from common.commands import UpdateContainer
from common.errors import InvalidRequest
from common.messages import Command
from common.names import has_control_characters
from common.options import MAX_TOTAL_LENGTH, OPTIONS, check_config, find_option, parse_allowance, parse_config
from common.reports import ContainerSpec

PROFILE = settings(max_examples=300, deadline=None, database=None)
KEYS = st.sampled_from([option.key.replace("*", "NAME") for option in OPTIONS]) | st.text(max_size=20)
VALUES = st.sampled_from(
    [
        *[
            "1",
            "0",
            "2",
            "true",
            "FALSE",
            "yes",
            "20%",
            "0%",
            "5GB",
            "1MiB",
            "1kB",
            "25ms/100ms",
            "0ms/1ms",
            "-1",
            "1.5",
            "٣",
            "100000000000",
        ],
        "",
        "a\nb",
        "x" * 5000,
    ]
) | st.text(max_size=20)


@PROFILE
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_whatever_passes_can_be_parsed_and_stands_in_one_line(config: dict[str, str]) -> None:
    try:
        check_config(config)
    except InvalidRequest as error:
        assert error.field is not None
        assert error.field.startswith("config")
        assert error.allowed
        return
    parsed = parse_config(config)
    for key, value in config.items():
        assert not has_control_characters(key + value)
    assert parsed.memory is None or parsed.memory_share is None
    assert (parsed.memory_bytes(10**9) or 1) > 0


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("limits.cpus", "4", ["0", "4097", "0-3", "1.5", "", "1\n"]),
        ("limits.cpu", "1", ["", "-1"]),
        ("limits.cpu.allowance", "50%", ["0%", "101%", "50", "0ms/100ms", "10ms/0ms", "10ms/2000ms", "10s/100ms"]),
        ("limits.memory", "512MiB", ["0", "1kB", "0%", "101%", "-1", "5G", "lots"]),
        ("limits.memory", "20%", [""]),
        ("limits.disk", "5GB", ["20%", "0", "1kB", ""]),
        ("limits.processes", "100", ["0", "4194305", "many"]),
        ("boot.autostart", "true", ["", "maybe", "2"]),
        ("boot.autostart.priority", "0", ["-1", "1000001", "high"]),
        ("environment.PATH", "/bin:/usr/bin", ["a\nb", "a\x00", "a\u2028b", "x" * 4097]),
        ("user.note", "whatever = # [it] is", ["a\rb", "\x1b[31m"]),
        ("security.privileged", "false", ["no way"]),
        ("security.nesting", "on", ["-"]),
    ],
)
def test_values(key: str, good: str, bad: list[str]) -> None:
    check_config({key: good})
    for value in bad:
        with pytest.raises(InvalidRequest) as caught:
            check_config({key: value})
        assert caught.value.field == f"config.{key}"
        assert caught.value.allowed


@pytest.mark.parametrize(
    "key",
    [
        *[
            "limits",
            "limits.",
            "limits.cpus.x",
            "LIMITS.CPUS",
            "environment.",
            "environment.1X",
            "environment.A-B",
            "environment.*",
        ],
        *["user.", "user.*", "raw.lxc", "lxc.hook.pre-start"],
        "",
        "environment.A\nB",
        "user.a b",
        "user.a\n",
    ],
)
def test_unknown_keys_are_refused(key: str) -> None:
    assert find_option(key) is None
    with pytest.raises(InvalidRequest):
        check_config({key: "1"})


def test_both_spellings_of_cpus_must_agree() -> None:
    check_config({"limits.cpu": "2", "limits.cpus": "2"})
    assert parse_config({"limits.cpu": "2"}).cpus == 2
    with pytest.raises(InvalidRequest):
        check_config({"limits.cpu": "2", "limits.cpus": "3"})


def test_allowances() -> None:
    soft, hard = parse_allowance("50%", "x"), parse_allowance("250ms/100ms", "x")
    assert (soft.share, soft.cpus) == (50, None)
    assert (hard.quota_us, hard.period_us, hard.cpus) == (250_000, 100_000, 2.5)


def test_the_largest_configuration_fits_into_a_message() -> None:
    # Three bytes in UTF-8 for each character.
    config = {f"user.{number}": "世" * 4000 for number in range(MAX_TOTAL_LENGTH // 4010)}
    check_config(config)
    spec = ContainerSpec("a", 1, "a", "00:16:3e:00:00:01", config)
    assert codec.encode(Command("op/1/do", 1, "s", 1, 1.0, UpdateContainer(spec)))
    with pytest.raises(InvalidRequest):
        check_config({f"user.{number}": "x" * 4000 for number in range(MAX_TOTAL_LENGTH // 4000 + 1)})


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        check_config({f"user.{number}": "" for number in range(513)})


def test_every_default_passes_its_own_check() -> None:
    for option in OPTIONS:
        if option.default:
            option.check(option.default, option.key)
