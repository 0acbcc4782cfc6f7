"""Bodies of requests: from JSON to typed values. What is wrong is named by its path, with what is allowed there."""

from __future__ import annotations

import re
from datetime import datetime
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct, UnsetType

from common.errors import InvalidRequest

T = TypeVar("T")
# msgspec says where: "… - at `$.config[...]`", or "… - at `key` in `$.config`"; [...] stands for any key.
_MESSAGE = re.compile(r"(?P<text>.*?)(?: - at (?P<key>`key` in )?`(?P<path>[^`]*)`)?", re.DOTALL)
_NAMED = re.compile(r"Object (?P<what>contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)
_PLACE = re.compile(r"\.([^.\[]+)|(\[\.\.\.\])")
_WORDS = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    datetime: "a time in RFC 3339",
    Any: "any value",
}
_LONGEST_NAME = 160


def decode(body: bytes, kind: type[T]) -> T:
    """The body as `kind`; no body is an empty object. Raises InvalidRequest naming `field` and `allowed`."""
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind, _plain(body)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from None


def has_field(body: bytes, name: str) -> bool:
    """Whether the body is an object with this field, so that its kind can be told. Raises InvalidRequest."""
    try:
        return name in msgspec.json.decode(body or b"{}", type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return False
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from None


def _malformed(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"malformed JSON: {str(error)[:200]}", field="body", allowed="one JSON object")


def _plain(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body or b"{}")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _explain(message: str, kind: Any, plain: Any) -> InvalidRequest:
    match = _MESSAGE.fullmatch(message)
    text, path, key = (match["text"], match["path"] or "$", match["key"]) if match else (message, "$", None)
    field, found, value = _walk(kind, plain, path)
    if key is not None:
        key_kind = get_args(_member(found, value))[0]
        wrong = next((name for name in value if not _fits(name, key_kind)), "")
        name = _join(field, wrong)
        return InvalidRequest(f"{name}: invalid key: {text[:300]}", field=name, allowed=_words(key_kind))
    if named := _NAMED.fullmatch(text):
        name = _join(field, named["name"]) or "body"
        if named["what"] == "contains unknown":
            return InvalidRequest(f"unknown field {name!r}", field=name, allowed=_fields_of(_member(found, value)))
        allowed = _words(_field_kind(found, value, named["name"]))
        return InvalidRequest(f"the field {name!r} is missing", field=name, allowed=allowed)
    return InvalidRequest(f"{field or 'body'}: {text[:300]}", field=field or "body", allowed=_words(found))


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name[:_LONGEST_NAME]) if part)


def _walk(kind: Any, plain: Any, path: str) -> tuple[str, Any, Any]:
    """Follow msgspec's path: the field's path with its keys' real names, the type there, and the value there."""
    field = ""
    for name, any_key in _PLACE.findall(path.removeprefix("$")):
        if any_key:
            item_kind = get_args(_member(kind, plain))[1]
            name = next((key for key, item in plain.items() if not _fits(item, item_kind)), "*")
            kind = item_kind
        else:
            kind = _field_kind(kind, plain, name)
        plain = plain.get(name) if isinstance(plain, dict) else None
        field = _join(field, name)
    return field, kind, plain


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _members(kind: Any) -> list[Any]:
    """What a type may be, without null, "not given" and annotations."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [found for part in get_args(kind) for found in _members(part)]
    return [kind] if kind not in (NoneType, UnsetType) else []


def _member(kind: Any, plain: Any) -> Any:
    """The one type that is meant: of several structs the one whose tag the value bears."""
    members = _members(kind)
    if len(members) > 1 and isinstance(plain, dict):
        for member in members:
            config = member.__struct_config__
            if plain.get(config.tag_field) == config.tag:
                return member
    return members[0] if members else kind


def _field_kind(kind: Any, plain: Any, name: str) -> Any:
    """The type of a struct's field; of a union's tag, the tags."""
    structs = [member for member in _members(kind) if _is_struct(member)]
    if any(member.__struct_config__.tag_field == name for member in structs):
        return Literal[tuple(str(member.__struct_config__.tag) for member in structs)]
    struct = _member(kind, plain)
    fields = msgspec.structs.fields(struct) if _is_struct(struct) else ()
    return next((field.type for field in fields if field.encode_name == name), Any)


def _fields_of(kind: Any) -> str:
    if not _is_struct(kind):
        return "none"
    tag = kind.__struct_config__.tag_field
    return (
        ", ".join([*([tag] if tag else []), *(field.encode_name for field in msgspec.structs.fields(kind))]) or "none"
    )


def _words(kind: Any) -> str:
    """A type in words a caller understands."""
    members = _members(kind)
    if not members:
        return "null"
    if get_origin(members[0]) is Literal:
        return ", ".join(get_args(members[0]))
    if _is_struct(members[0]):
        return "an object"
    if get_origin(members[0]) is dict:
        return f"an object, each value {_words(get_args(members[0])[1])}"
    return _WORDS.get(members[0], "a value") + _limits(kind)


def _limits(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return "".join(_limits(part) for part in get_args(kind))
    if get_origin(kind) is not Annotated:
        return ""
    meta = next((part for part in get_args(kind)[1:] if isinstance(part, Meta)), Meta())
    if meta.ge is not None and meta.le is not None:
        return f" from {meta.ge:g} to {meta.le:g}"
    if meta.min_length is not None and meta.min_length == meta.max_length:
        return f" of {meta.max_length} characters"
    return f" of at most {meta.max_length} characters" if meta.max_length is not None else ""


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)
