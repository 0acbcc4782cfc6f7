"""/1.0/reconciliation: whether the controller accepts writes, and why not."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from common.errors import InvalidRequest
from controller.api.base import Handler
from controller.api.identity import Right
from controller.services.reconciliation import Reconciliation as Mode


class ReconciliationBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What an administrator says."""

    active: bool


class Reconciliation(Handler):
    """GET, and PUT by which an administrator ends it: what is missing is accepted as lost."""

    rights = {"GET": Right.READ, "PUT": Right.ADMIN}
    while_reconciling = True

    def get(self) -> None:
        self.answer(reconciliation_view(self.services.reconciliation))

    def put(self) -> None:
        if self.body(ReconciliationBody).active:
            raise InvalidRequest("it begins by itself, it can only be ended", field="active", allowed="false")
        self.services.reconciliation.end(self.known.name)
        self.answer({})


def reconciliation_view(mode: Mode) -> dict[str, Any]:
    """The mode as it is shown."""
    begun = mode.begun
    if begun is None:
        return {"active": False, "reason": "", "since": None, "awaited": []}
    return {"active": True, "reason": begun.reason, "since": begun.since, "awaited": mode.awaited}


routes = [(r"/1\.0/reconciliation", Reconciliation)]
