"""Aliases as they stand in images, and what is told when they and their images change."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from controller.api.image_export import file_name, range_of
from controller.records import Change, Image
from controller.services.aliases import Alias, aliases_of, etag_of, with_alias, without_alias
from controller.store.telling import derive
from controller.store.telling_images import alias_url

THEN = "2026-01-01T00:00:00.000000Z"
ONE = Image("1" * 64, "rootfs", 1, {}, (), "", "one.tar", THEN)
OTHER = replace(ONE, fingerprint="2" * 64)


def change(before: Image | None, after: Image | None) -> Change:
    image = after or before
    assert image is not None
    return Change(Image, image.fingerprint, after, new=before is None, before=before)


def told(*changes: Change) -> list[tuple[str, str, Any]]:
    return [(event.action, event.source, event.body["context"]) for event in derive(changes)]


def test_an_alias_comes_and_goes_with_its_description() -> None:
    image = with_alias(with_alias(ONE, "a/b"), "c", "the third letter")
    assert aliases_of(image) == [Alias("a/b", ONE.fingerprint, ""), Alias("c", ONE.fingerprint, "the third letter")]
    assert without_alias(without_alias(image, "c"), "a/b") == ONE
    assert without_alias(image, "none") == image


def test_the_etag_follows_what_can_be_written() -> None:
    alias = Alias("a", ONE.fingerprint, "")
    changed = [replace(alias, description="x"), replace(alias, target=OTHER.fingerprint), replace(alias, name="b")]
    assert len({etag_of(each) for each in (alias, *changed)}) == 4


def test_a_slash_is_escaped_in_an_aliass_url() -> None:
    assert alias_url("ubuntu/22.04") == "/1.0/images/aliases/ubuntu%2F22.04"


def test_what_is_told_of_aliases() -> None:
    named, described = with_alias(ONE, "a/b"), with_alias(ONE, "a/b", "text")
    url, target = "/1.0/images/aliases/a%2Fb", {"target": ONE.fingerprint}
    assert told(change(ONE, named)) == [("image-alias-created", url, target)]
    assert told(change(named, described)) == [("image-alias-updated", url, target)]
    assert told(change(named, ONE)) == [("image-alias-deleted", url, target)]
    assert told(change(named, with_alias(ONE, "c"))) == [
        ("image-alias-renamed", "/1.0/images/aliases/c", {"old_name": "a/b", "target": ONE.fingerprint})
    ]
    moved = (change(named, ONE), change(OTHER, with_alias(OTHER, "a/b")))
    assert told(*moved) == [("image-alias-updated", url, {"target": OTHER.fingerprint})]
    assert told(*reversed(moved)) == told(*moved)


def test_what_is_told_of_images_and_what_is_not() -> None:
    url = f"/1.0/images/{ONE.fingerprint}"
    assert told(change(ONE, replace(ONE, public=True))) == [("image-updated", url, {})]
    assert told(change(ONE, replace(ONE, last_used_at=THEN))) == []
    assert [action for action, _, _ in told(change(None, with_alias(ONE, "a")))] == [
        "image-created",
        "image-alias-created",
    ]
    assert [action for action, _, _ in told(change(with_alias(ONE, "a"), None))] == [
        "image-deleted",
        "image-alias-deleted",
    ]


def test_two_changes_of_one_transaction_are_told_as_one() -> None:
    named, public = with_alias(ONE, "a"), replace(with_alias(ONE, "a"), public=True)
    actions = [action for action, _, _ in told(change(ONE, named), change(named, public))]
    assert actions == ["image-updated", "image-alias-created"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes=0-", (0, 10)),
        ("bytes=0-0", (0, 1)),
        ("bytes=9-99", (9, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=10-", (10, 10)),
        ("bytes=11-12", (10, 10)),
        ("bytes=-0", (10, 10)),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=1-2,3-4", None),
        ("bytes=\u0661-", None),
        ("", None),
    ],
)
def test_ranges(text: str, expected: tuple[int, int] | None) -> None:
    assert range_of(text, 10) == expected


def test_a_file_name_is_harmless() -> None:
    for given, shown in (
        ("jammy.tar.xz", "jammy.tar.xz"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ('a"b\r\nc: d', "a_b__c__d"),
        ("", f"{ONE.fingerprint}.tar"),
        ("...", f"{ONE.fingerprint}.tar"),
    ):
        assert file_name(replace(ONE, filename=given)) == shown
