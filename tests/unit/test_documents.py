"""The documents that are made from the code are up to date, and the API's document names every endpoint."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from agent.config import AgentConfig
from common.options import OPTIONS
from controller.api.application import ROUTES
from controller.documents import configuration
from controller.settings import ControllerSettings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_configuration_document_is_up_to_date() -> None:
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == configuration(), "run: python -m controller.documents > docs/configuration.md"


def test_every_key_is_in_it() -> None:
    assert all(f"| `{option.key}` |" in configuration() for option in OPTIONS)


def _documented() -> dict[str, set[str]]:
    """Path patterns of docs/api.md's headings such as "### GET, POST /1.0/vz/<id>", each with its methods."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    found: dict[str, set[str]] = {}
    for methods, path in re.findall(r"^### ((?:[A-Z]+, )*[A-Z]+) (/\S*)$", text, re.MULTILINE):
        found.setdefault(path, set()).update(methods.split(", "))
    return found


@pytest.mark.parametrize(("pattern", "methods"), [(pattern, set(handler.rights)) for pattern, handler in ROUTES])
def test_every_route_and_method_is_documented(pattern: str, methods: set[str]) -> None:
    path = re.sub(r"\([^)]*\)", "<>", pattern).replace("\\", "")
    documented = {re.sub(r"<[^>]*>", "<>", key): value for key, value in _documented().items()}
    assert documented.get(path) == methods


def test_nothing_else_is_documented() -> None:
    served = {re.sub(r"\([^)]*\)", "<>", pattern).replace("\\", "") for pattern, _ in ROUTES}
    assert {re.sub(r"<[^>]*>", "<>", path) for path in _documented()} <= served


@pytest.mark.parametrize("settings", [ControllerSettings, AgentConfig])
def test_every_setting_is_documented(settings: type[msgspec.Struct]) -> None:
    text = (DOCS / "operating.md").read_text(encoding="utf-8")
    names = {field.name for field in msgspec.structs.fields(settings)} - {"state"}
    assert {name for name in names if f"`{name}`" not in text} == set()
