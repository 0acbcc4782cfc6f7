"""The built-in images, found by their properties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import InvalidRequest, NotFound
from controller.images.builder import FIELD, Builder, BuiltImage, ReportProgress
from controller.images.busybox import BusyboxBuilder
from controller.images.debian import DebianBuilder

__all__ = ["Builder", "BuiltImage", "BusyboxBuilder", "DebianBuilder", "ReportProgress", "find_builder"]


def find_builder(builders: Sequence[Builder], properties: Mapping[str, str]) -> Builder:
    """The builder for `properties`, which it has checked.

    Raises NotFound for an operating system that none of them makes, else what `Builder.check` raises.
    """
    known = ", ".join(builder.os for builder in builders)
    if "os" not in properties:
        raise InvalidRequest("the image's properties name no os", field=f"{FIELD}.os", allowed=known)
    for builder in builders:
        if builder.matches(properties):
            builder.check(properties)
            return builder
    raise NotFound(f"no image of os {properties['os'][:80]!r}", field=f"{FIELD}.os", allowed=known)
