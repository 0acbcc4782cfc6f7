"""GET /1.0/metadata/configuration: the configuration keys, from the one table."""

from __future__ import annotations

from common.options import OPTIONS
from controller.api.base import Handler
from controller.api.identity import Right


class Configuration(Handler):
    """GET."""

    rights = {"GET": Right.READ}

    def get(self) -> None:
        keys = {
            option.key: {
                "type": option.type,
                "default": option.default,
                "liveupdate": "yes" if option.live else "no",
                "shortdesc": option.description,
                "allowed": option.allowed,
            }
            for option in OPTIONS
        }
        self.answer({"configs": {"container": keys}})


routes = [(r"/1\.0/metadata/configuration", Configuration)]
