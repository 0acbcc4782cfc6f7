"""GET / and GET /1.0: the server object, reduced for callers without a token; the CA certificate."""

from __future__ import annotations

from typing import Any

from controller.api.base import Handler
from controller.api.identity import Right
from controller.api.reconciliation import reconciliation_view

API_EXTENSIONS = (
    "operations_history",
    "placement",
    "nodes",
    "metadata_configuration",
    "event_lifecycle",
    "events_since",
)


class Root(Handler):
    """GET /: the versions of the API."""

    rights = {"GET": Right.PUBLIC}

    def get(self) -> None:
        self.answer(["/1.0"])


class Server(Handler):
    """GET /1.0."""

    rights = {"GET": Right.PUBLIC}

    def get(self) -> None:
        facts = self.services.server
        view: dict[str, Any] = {
            "api_extensions": list(API_EXTENSIONS),
            "api_status": "stable",
            "api_version": "1.0",
            "auth": "untrusted",
            "auth_methods": ["bearer"],
            "public": False,
        }
        if self.caller is not None:
            fleet = self.services.fleet
            view["auth"] = "trusted"
            view["config"] = {}
            view["environment"] = {
                "server": "vzfleet",
                "server_name": facts.name,
                "server_version": facts.version,
                "server_clustered": True,
                "epoch": self.services.witnesses.epoch,
                "nodes": len(fleet.nodes),
                "containers": len(fleet.containers),
            }
            view["reconciliation"] = reconciliation_view(self.services.reconciliation)
        self.answer(view)


class Authority(Handler):
    """GET /1.0/ca: the certificate by which to know this controller, in PEM."""

    rights = {"GET": Right.PUBLIC}

    def get(self) -> None:
        self.set_header("Content-Type", "application/x-pem-file")
        self.finish(self.services.server.ca)


routes = [(r"/", Root), (r"/1\.0", Server), (r"/1\.0/ca", Authority)]
