"""metadata.yaml of LXD's image formats, read as plain text values from a hostile file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from common.errors import InvalidRequest
from common.names import has_control_characters

MAX_METADATA = 64 * 1024
MAX_PROPERTIES = 64
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_VALUE = 1024
PROPERTY_NAME_RULE = "1-64 of A-Z a-z 0-9 . _ -"
PROPERTY_RULE = f"at most {MAX_VALUE} characters, none of them a control character"
_SECONDS = re.compile(r"[0-9]{1,11}")
FIELD = "file.metadata.yaml"


@dataclass(frozen=True)
class Metadata:
    """What metadata.yaml says; `architecture` stands in `properties` too."""

    architecture: str
    created_at: datetime | None
    properties: dict[str, str]


def check_properties(properties: Mapping[str, str], field: str) -> dict[str, str]:
    """Return what may be an image's properties, else raise InvalidRequest; `field` is where they stand."""
    if len(properties) > MAX_PROPERTIES:
        raise InvalidRequest("too many properties", field=field, allowed=f"at most {MAX_PROPERTIES}")
    for name, value in properties.items():
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"invalid property {name[:80]!r}", field=field, allowed=PROPERTY_NAME_RULE)
        if not _is_text(value):
            raise InvalidRequest(f"invalid property {name}", field=f"{field}.{name}", allowed=PROPERTY_RULE)
    return dict(properties)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_VALUE and not has_control_characters(value)


class _TextLoader(yaml.BaseLoader):
    """Maps, lists and text only: no tags are resolved, so `14.04` stays as it is written, and no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise InvalidRequest("metadata.yaml has an alias", field=FIELD, allowed="YAML without aliases")
        return super().compose_node(parent, index)


def read_metadata(text: bytes) -> Metadata:
    """Read metadata.yaml (at most MAX_METADATA bytes). Raises InvalidRequest naming what is wrong."""
    fields = _load(text)
    architecture = fields.get("architecture")
    if not isinstance(architecture, str) or not _NAME.fullmatch(architecture):
        raise _refused("architecture", "a name such as x86_64")
    given = fields.get("properties") or {}
    if not isinstance(given, dict) or len(given) > MAX_PROPERTIES:
        raise _refused("properties", f"a map of at most {MAX_PROPERTIES} names to texts")
    properties = {_property_name(name): _property(name, value) for name, value in given.items()}
    return Metadata(architecture, _created_at(fields), {"architecture": architecture} | properties)


def _load(text: bytes) -> dict[Any, Any]:
    if len(text) > MAX_METADATA:
        raise InvalidRequest("metadata.yaml is too large", field=FIELD, allowed=f"at most {MAX_METADATA} bytes")
    try:
        loader = _TextLoader(text)
        try:
            fields = loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidRequest(f"metadata.yaml cannot be read: {str(error)[:200]}", field=FIELD) from None
    if not isinstance(fields, dict):
        raise InvalidRequest("metadata.yaml is no map", field=FIELD, allowed="a map with architecture and properties")
    return fields


def _property_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refused("properties", f"names of {PROPERTY_NAME_RULE}")
    return name


def _property(name: object, value: object) -> str:
    if not isinstance(value, str) or not _is_text(value):
        raise _refused(f"properties.{name}", PROPERTY_RULE)
    return value


def _created_at(fields: dict[Any, Any]) -> datetime | None:
    """`creation_date` in seconds since 1970; None when it is not there or 0."""
    seconds = fields.get("creation_date") or "0"
    if not isinstance(seconds, str) or not _SECONDS.fullmatch(seconds):
        raise _refused("creation_date", "seconds since 1970")
    return datetime.fromtimestamp(int(seconds), UTC) if int(seconds) else None


def _refused(field: str, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"metadata.yaml has no usable {field}", field=f"{FIELD}.{field}", allowed=allowed)
