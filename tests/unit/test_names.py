"""Names: nothing that passes can leave its directory, its line or its argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.names import (
    check_alias,
    check_container_id,
    check_fingerprint,
    check_hostname,
    check_node_name,
    check_snapshot_name,
    dns_label,
    has_control_characters,
)

PROFILE = settings(max_examples=300, deadline=None, database=None)
PATH_CHECKS = [check_container_id, check_snapshot_name, check_node_name, check_fingerprint]
ALL_CHECKS = [*PATH_CHECKS, check_hostname, check_alias]
HOSTILE = ["", ".", "..", "../x", "a/b", "-rf", "a\n", "a\nb", "a\x00", "a b", "é", "a\u2028", "a\u200b", "a" * 200]
# Characters of which valid names are made too, so that the random texts pass often enough to mean something.
TEXT = st.text(st.sampled_from("abZ09._-/:, \n\x00~!$;é") | st.characters(), max_size=70)


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["", "a\n", "\na", "a\x00", "a b", "é", "a\u2028", "a" * 200])
def test_no_name_may_end_its_line_or_its_word(check: Callable[[str], str], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(name)
    assert caught.value.field
    assert caught.value.allowed


@pytest.mark.parametrize("check", PATH_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_of_a_path_may_leave_its_directory(check: Callable[[str], str], name: str) -> None:
    with pytest.raises(InvalidRequest):
        check(name)


@pytest.mark.parametrize("check", PATH_CHECKS, ids=lambda check: check.__name__)
def test_any_name_that_passes_is_one_plain_path_component(check: Callable[[str], str]) -> None:
    @PROFILE
    @given(TEXT)
    def holds(name: str) -> None:
        try:
            assert check(name) == name
        except InvalidRequest:
            return
        assert PurePosixPath("/base", name).parent == PurePosixPath("/base")
        assert name not in (".", "..")
        assert not name.startswith("-")
        assert name.isascii()
        assert not has_control_characters(name)

    holds()


@pytest.mark.parametrize("name", ["101", "a", "web-1", "A.b_c-9", "a" * 64, "0"])
def test_good_ids_pass(name: str) -> None:
    assert check_container_id(name) == name


@pytest.mark.parametrize("name", ["node1", "a", "a-b", "a" * 63])
def test_good_node_names_pass(name: str) -> None:
    assert check_node_name(name) == name


@pytest.mark.parametrize("name", ["-a", "a-", "A", "a.b", "a" * 64])
def test_bad_node_names_do_not(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_node_name(name)


@PROFILE
@given(TEXT)
def test_any_hostname_that_passes_is_one_printable_word(name: str) -> None:
    try:
        check_hostname(name)
    except InvalidRequest:
        return
    assert 1 <= len(name) <= 64
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set("/:, ")


@PROFILE
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64))
def test_a_dns_label_is_always_one(hostname: str) -> None:
    label = dns_label(hostname)
    assert 1 <= len(label) <= 63
    assert all(mark in "abcdefghijklmnopqrstuvwxyz0123456789-" for mark in label)
    assert not label.startswith("-")
    assert not label.endswith("-")
    assert dns_label(hostname) == label


@pytest.mark.parametrize("mark", ["\n", "\r", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\u200b", "\ud800"])
def test_control_characters_are_seen(mark: str) -> None:
    assert has_control_characters(f"a{mark}b")


def test_plain_text_has_none() -> None:
    assert not has_control_characters("Grüße, 世界 = ok #1")
