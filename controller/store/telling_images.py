"""What there is to tell of changed images and of their aliases, with LXD's names (image-*, image-alias-*). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec

from controller.records import Change, Image


@dataclass(frozen=True)
class Told:
    """An action, the URL of what it is about, its name, and what else is to be said."""

    action: str
    source: str
    name: str
    context: Mapping[str, Any]


def alias_url(alias: str) -> str:
    """Where an alias is in the API; a slash in it is escaped."""
    return f"/1.0/images/aliases/{quote(alias, safe='')}"


def told_of_images(changes: Iterable[Change]) -> Iterator[Told]:
    """The images of one transaction, then their aliases. That an image was used is not told."""
    changes = list(changes)
    for change in changes:
        verb = _verb(change)
        if verb is not None:
            yield Told(f"image-{verb}", f"/1.0/images/{change.key}", change.key, {})
    old = {alias: told for change in changes for alias, told in _aliases(change.before).items()}
    new = {alias: told for change in changes for alias, told in _aliases(change.record).items()}
    gone, come = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    if len(gone) == len(come) == 1 and old[gone[0]] == new[come[0]]:
        yield _alias("renamed", come[0], {"old_name": gone[0], "target": new[come[0]][0]})
        gone, come = [], []
    for alias in gone:
        yield _alias("deleted", alias, {"target": old[alias][0]})
    for alias in come:
        yield _alias("created", alias, {"target": new[alias][0]})
    for alias in sorted(old.keys() & new.keys()):
        if old[alias] != new[alias]:
            yield _alias("updated", alias, {"target": new[alias][0]})


def _verb(change: Change) -> str | None:
    record, before = change.record, change.before
    if record is None:
        return "deleted"
    if change.new:
        return "created"
    return None if before is not None and _lasting(record) == _lasting(before) else "updated"


def _lasting(record: object) -> Image | None:
    """What of an image is its own: its aliases are told for themselves."""
    if not isinstance(record, Image):
        return None
    return msgspec.structs.replace(record, aliases=(), descriptions={}, last_used_at=None)


def _aliases(record: object) -> dict[str, tuple[str, str]]:
    """The target and the description of each alias."""
    if not isinstance(record, Image):
        return {}
    return {alias: (record.fingerprint, record.descriptions.get(alias, "")) for alias in record.aliases}


def _alias(verb: str, alias: str, context: Mapping[str, Any]) -> Told:
    return Told(f"image-alias-{verb}", alias_url(alias), alias, context)
