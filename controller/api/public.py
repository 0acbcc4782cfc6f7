"""What anyone may see: public images. A token that comes along must be a good one all the same."""

from __future__ import annotations

from typing import Any

from common.errors import Unauthorized
from controller.api.base import Handler
from controller.api.views import image_view
from controller.records import Image
from controller.services.caller import Caller


def caller_or_anyone(handler: Handler) -> Caller | None:
    """Who calls; None for anyone without a token. Raises Unauthorized for a token that is unknown."""
    if handler.caller is None and handler.request.headers.get("Authorization"):
        raise Unauthorized("the token is unknown")
    return handler.caller


def image_for(caller: Caller | None, image: Image) -> dict[str, Any]:
    """An image as this caller sees it: from where it comes is not for everybody."""
    return image_view(image) | ({"update_source": None} if caller is None else {})
