"""What is told of images and their aliases: by what they were before and after one transaction."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from controller.records import Change, Image
from controller.store.telling import derive

THEN = "2026-01-01T00:00:00.000000Z"
ONE = Image("1" * 64, "unified", 1, {"os": "tiny"}, ("a",), "", "", THEN)
OTHER = Image("2" * 64, "unified", 1, {}, (), "", "", THEN)
URL = "/1.0/images/aliases/"


def told(*changes: tuple[Image | None, Image | None]) -> list[tuple[str, str, dict[str, Any]]]:
    """Action, what it is about, context; a change is an image before and after."""
    made = []
    for before, after in changes:
        key = (after or before or ONE).fingerprint
        made.append(Change(Image, key, after, new=before is None, before=before))
    return [(event.action, event.source, event.body["context"]) for event in derive(made)]


def test_an_image_tells_of_itself_and_of_its_aliases() -> None:
    image, alias = f"/1.0/images/{ONE.fingerprint}", {"target": ONE.fingerprint}
    assert told((None, ONE)) == [("image-created", image, {}), ("image-alias-created", f"{URL}a", alias)]
    assert told((ONE, None)) == [("image-deleted", image, {}), ("image-alias-deleted", f"{URL}a", alias)]
    assert told((ONE, replace(ONE, public=True))) == [("image-updated", image, {})]


def test_a_change_of_aliases_is_none_of_the_image() -> None:
    target = {"target": ONE.fingerprint}
    assert told((ONE, replace(ONE, aliases=("a", "b/c")))) == [("image-alias-created", f"{URL}b%2Fc", target)]
    assert told((ONE, replace(ONE, aliases=()))) == [("image-alias-deleted", f"{URL}a", target)]
    assert told((ONE, replace(ONE, descriptions={"a": "new"}))) == [("image-alias-updated", f"{URL}a", target)]
    renamed = {"old_name": "a", "target": ONE.fingerprint}
    assert told((ONE, replace(ONE, aliases=("b",)))) == [("image-alias-renamed", f"{URL}b", renamed)]


def test_an_alias_that_moves_is_told_once() -> None:
    moved = ((ONE, replace(ONE, aliases=())), (OTHER, replace(OTHER, aliases=("a",))))
    expected = [("image-alias-updated", f"{URL}a", {"target": OTHER.fingerprint})]
    assert told(*moved) == expected
    assert told(*reversed(moved)) == expected


def test_several_changes_of_one_image_count_from_the_first_to_the_last() -> None:
    between = replace(ONE, aliases=())
    assert told((ONE, between), (between, replace(ONE, public=True))) == [
        ("image-updated", f"/1.0/images/{ONE.fingerprint}", {})
    ]


def test_that_an_image_was_used_is_not_told() -> None:
    assert told((ONE, replace(ONE, last_used_at=THEN))) == []
