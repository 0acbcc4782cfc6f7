"""/1.0/operations, /1.0/operations/<uuid> and /1.0/operations/<uuid>/wait."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import orjson

from common.errors import Conflict, InvalidRequest
from common.names import check_container_id
from common.states import Status, status_named
from controller.api.base import Handler
from controller.api.envelopes import sync_envelope
from controller.api.identity import Right
from controller.api.views import operation_view

MAX_PAGE = 10_000
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Operations(Handler):
    """GET: by status as LXD does, newest first in each, filtered by container, node and status."""

    rights = {"GET": Right.READ}
    parameters = ("recursion", "container", "node", "status", "limit", "cursor")

    async def get(self) -> None:
        container = self.get_query_argument("container", "")
        node = self.get_query_argument("node", "")
        limit = self.whole_parameter("limit", 1000, 1, MAX_PAGE)
        found = await self.services.operations.find(
            container=check_container_id(container, "container") if container else None,
            node=self.services.nodes.require(node).record.name if node else None,
            status=self._status(),
            limit=limit,
            before=self._cursor(),
        )
        if len(found) == limit:
            self.set_header("X-Next-Cursor", found[-1].id)
        groups: dict[str, list[Any]] = {}
        for operation in found:
            shown: Any = f"/1.0/operations/{operation.id}"
            if self.recursion() > 0:
                shown = operation_view(operation, self.services.operations)
            groups.setdefault(operation.status.text.lower(), []).append(shown)
        self.answer(groups)

    def _cursor(self) -> str | None:
        text = self.get_query_argument("cursor", "")
        if text and not _UUID.fullmatch(text):
            raise InvalidRequest(f"invalid cursor {text[:40]!r}", field="cursor", allowed="the id of an operation")
        return text or None

    def _status(self) -> Status | None:
        text = self.get_query_argument("status", "")
        status = status_named(text) if text else None
        if text and status is None:
            raise InvalidRequest(
                f"unknown status {text[:40]!r}",
                field="status",
                allowed="running, cancelling, success, failure, cancelled",
            )
        return status


class Operation(Handler):
    """GET, and DELETE, which cancels, or with `force=1` ends one that waits for a node in vain."""

    rights = {"GET": Right.READ, "DELETE": Right.OPERATE}
    parameters = ("force",)

    async def get(self, operation: str) -> None:
        found = await self.services.operations.get(operation)
        self.answer(operation_view(found, self.services.operations))

    async def delete(self, operation: str) -> None:
        try:
            if self.flag_parameter("force"):
                await self.services.operations.abandon(operation)
            else:
                await self.services.operations.cancel(operation)
        except Conflict as error:
            # R19: what cannot be cancelled is a bad request, not a conflict.
            raise InvalidRequest(error.text, field="operation", allowed=error.allowed) from None
        await self.answer_write({})


class Wait(Handler):
    """GET: answers when the operation has ended, or after `timeout` seconds (-1: for ever) as it is then (R18)."""

    rights = {"GET": Right.READ}
    parameters = ("timeout",)
    _waiting: asyncio.Task[Any] | None = None

    async def get(self, operation: str) -> None:
        seconds = self.whole_parameter("timeout", -1, -1, 86400)
        await self.services.operations.get(operation)
        # The headers go out at once, so that proxies and clients see that the wait is on.
        await self.flush()
        waiting = self.services.operations.wait(operation, None if seconds < 0 else float(seconds))
        self._waiting = asyncio.ensure_future(waiting)
        found = await self._waiting
        await self.finish(sync_envelope(orjson.dumps(operation_view(found, self.services.operations))))

    def on_connection_close(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()


routes = [
    (r"/1\.0/operations", Operations),
    (r"/1\.0/operations/([^/]+)", Operation),
    (r"/1\.0/operations/([^/]+)/wait", Wait),
]
