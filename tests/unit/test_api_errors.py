"""Errors as HTTP, and bodies that are not what they should be: which field is named, and what is said to be allowed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.errors import Busy, Internal, InvalidRequest, NoPlacement, VzfleetError
from controller.api.bodies import decode, has_field
from controller.api.errors import describe, error_envelope, http_status
from controller.services.requests import CreateBody, CreateWithIdBody, JoinBody, StateBody, UpdateBody

DOCUMENTED = {400, 401, 403, 404, 409, 412, 500, 405, 413, 429, 503, 507}


def every_error() -> list[type[VzfleetError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VzfleetError)]
    assert len(kinds) > 15
    return kinds


@pytest.mark.parametrize("kind", every_error())
def test_every_error_has_a_documented_code(kind: type[VzfleetError]) -> None:
    assert http_status(kind("x")) in DOCUMENTED


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, errors.InvalidRequest),
        (401, errors.Unauthorized),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (409, errors.Busy),
        (409, errors.NoPlacement),
        (412, errors.PreconditionFailed),
        (413, errors.TooLarge),
        (429, errors.TooMany),
        (500, errors.Internal),
        (503, errors.Unavailable),
        (507, errors.NoSpace),
    ],
)
def test_the_codes(code: int, kind: type[VzfleetError]) -> None:
    assert http_status(kind("x")) == code


def test_a_new_kind_of_error_has_its_parents_code() -> None:
    class Stranger(errors.NotFound):
        code = "stranger"

    assert http_status(Stranger("x")) == 404


def test_an_error_is_described_as_far_as_it_applies() -> None:
    busy = Busy("busy", details={"operation": "/1.0/operations/1"})
    assert describe(busy) == {"code": "busy", "operation": "/1.0/operations/1"}
    invalid = InvalidRequest("x", field="config.limits.cpus", allowed="1 to 8")
    assert describe(invalid) == {"code": "invalid", "field": "config.limits.cpus", "allowed": "1 to 8"}
    assert describe(NoPlacement("x", details={"nodes": {"a": "full"}}))["nodes"] == {"a": "full"}
    assert describe(Internal("x")) == {"code": "internal"}


def test_the_envelope_has_every_field() -> None:
    assert error_envelope(404, "gone", {"code": "not-found"}) == {
        "type": "error",
        "status": "",
        "status_code": 0,
        "operation": "",
        "error_code": 404,
        "error": "gone",
        "metadata": {"code": "not-found"},
    }


# ---------------------------------------------------------------- bodies

NONE = {"type": "none"}
SOURCES = "image, copy, migration, none, adopt"
TEXT = "a string of at most 4096 characters"


@pytest.mark.parametrize(
    ("kind", "body", "field", "allowed"),
    [
        (CreateBody, {}, "source", "an object"),
        (CreateBody, {"source": 5}, "source", "an object"),
        (CreateBody, {"source": {}}, "source.type", SOURCES),
        (CreateBody, {"source": {"type": "x"}}, "source.type", SOURCES),
        (CreateBody, {"source": {"type": 5}}, "source.type", SOURCES),
        (CreateBody, {"source": {"type": "none", "x": 1}}, "source.x", "type"),
        (CreateBody, {"source": {"type": "copy", "x": 1, "source": "a"}}, "source.x", "type, source, refresh"),
        (CreateBody, {"source": {"type": "copy"}}, "source.source", "a string of at most 129 characters"),
        (
            CreateBody,
            {"source": {"type": "image", "properties": {"os": "a", "release": 14.04}}},
            "source.properties.release",
            "a string of at most 128 characters",
        ),
        (
            CreateBody,
            {"source": NONE, "x": 1},
            "x",
            "source, hostname, config, description, node, start, bandwidth, timeout, force",
        ),
        (CreateBody, {"source": NONE, "start": "yes"}, "start", "true or false"),
        (CreateBody, {"source": NONE, "hostname": 5}, "hostname", TEXT),
        (CreateBody, {"source": NONE, "config": []}, "config", f"an object, each value {TEXT}"),
        (CreateBody, {"source": NONE, "config": {"a": "b", "limits.cpus": 2}}, "config.limits.cpus", TEXT),
        (CreateBody, {"source": NONE, "config": {"a" * 129: "b"}}, "config." + "a" * 129, None),
        (CreateWithIdBody, {"source": NONE, "id": 5}, "id", "a string of at most 128 characters"),
        (StateBody, {}, "action", "start, stop, restart, freeze, unfreeze"),
        (StateBody, {"action": "x"}, "action", "start, stop, restart, freeze, unfreeze"),
        (StateBody, {"action": "stop", "timeout": 9999}, "timeout", "a number from -1 to 3600"),
        (StateBody, {"action": "stop", "force": 0}, "force", "true or false"),
        (UpdateBody, {"config": {}, "hostname": None}, "hostname", TEXT),
        (UpdateBody, {"config": None}, "config", f"an object, each value {TEXT}"),
        (JoinBody, {"secret": "x", "public_key": "y"}, "public_key", "a string of 40 characters"),
        (StateBody, [], "body", "an object"),
    ],
)
def test_what_is_wrong_is_named(kind: Any, body: Any, field: str, allowed: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(json.dumps(body).encode(), kind)
    assert caught.value.field == field
    assert caught.value.allowed == allowed if allowed else caught.value.allowed


@pytest.mark.parametrize(
    "body", [b"{", b"\xff", b'{"config": {}, "status": NaN}', b'{"config": {}} {}', b'{"status":' * 10_000]
)
def test_malformed_json(body: bytes) -> None:
    for work in (lambda: decode(body, UpdateBody), lambda: has_field(body, "config")):
        with pytest.raises(InvalidRequest) as caught:
            work()
        assert (caught.value.field, caught.value.allowed) == ("body", "one JSON object")


def test_no_body_is_an_empty_object() -> None:
    assert decode(b"", dict[str, int]) == {}


def test_whether_a_field_is_there() -> None:
    assert has_field(b'{"source": null}', "source") and not has_field(b'{"sources": 1}', "source")
    assert not has_field(b"[]", "source") and not has_field(b"", "source")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "source",
    "type",
    "config",
    "hostname",
    "start",
    "properties",
    "os",
    "node",
    "action",
    "status",
    "a ` - at `$.b",
]
NAMED = st.recursive(
    JSON | st.sampled_from(["none", "image", "copy"]),
    lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)


@given(body=NAMED)
def test_any_json_is_taken_or_refused_with_field_and_allowed(body: Any) -> None:
    for kind in (CreateBody, StateBody, UpdateBody):
        try:
            decode(json.dumps(body).encode(), kind)
        except InvalidRequest as error:
            assert error.field and error.allowed and error.text


@given(body=st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused(body: bytes) -> None:
    for work in (lambda: decode(body, StateBody), lambda: has_field(body, "a")):
        try:
            work()
        except InvalidRequest as error:
            assert error.field and error.allowed
