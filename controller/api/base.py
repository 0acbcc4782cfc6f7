"""What all handlers share: the way of a request through identity and rights, what comes in and what goes out."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, ClassVar, TypeVar

import orjson
from tornado.web import HTTPError, RequestHandler

from common.errors import Conflict, InvalidRequest, NotFound, TooLarge, Unauthorized, VzfleetError
from common.units import MAX_SIZE
from controller.api.bodies import decode, has_field
from controller.api.envelopes import async_envelope, sync_envelope
from controller.api.errors import CODES, describe, error_envelope, http_status
from controller.api.identity import Right, authenticate, authorize
from controller.api.limits import MAX_BODY
from controller.api.services import Services
from controller.api.views import operation_view
from controller.records import Operation
from controller.services.caller import Caller
from controller.services.promises import Promise, check_key

log = logging.getLogger(__name__)
T = TypeVar("T")
_WHOLE = re.compile(r"-?[0-9]{1,19}")
READING = ("GET", "HEAD", "OPTIONS")
IGNORED_PARAMETERS = ("project", "target")
"""Sent by LXD's clients on every call; there is one project, and the node is named in the body."""


class Handler(RequestHandler):
    """Base of all handlers. `rights` names the right of every method that is served; what is not there is 405.

    `parameters` are the query's names that are understood, `prefixes` the beginnings of such; others are refused.
    `while_reconciling` serves writes also
    while the controller accepts none, because rows were lost. `streamed` bodies come after `prepare`.
    """

    rights: ClassVar[dict[str, Right]] = {}
    parameters: ClassVar[Sequence[str]] = ()
    prefixes: ClassVar[Sequence[str]] = ()
    while_reconciling: ClassVar[bool] = False
    streamed: ClassVar[bool] = False
    services: Services
    caller: Caller | None
    _promise: Promise | None = None

    def initialize(self, services: Services) -> None:
        self.services = services
        self.caller = None
        self.request_id = secrets.token_hex(8)

    def set_default_headers(self) -> None:
        self.set_header("Server", "vzfleet")
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")

    async def prepare(self) -> None:
        await self.identify()
        right = self.rights.get(self.request.method or "")
        if right is None:
            authorize(self.caller, Right.READ)
            raise HTTPError(405)
        authorize(self.caller, right)
        if self.request.method not in READING:
            if not self.streamed and await self.replay(self.request.body):
                return
            if not self.while_reconciling:
                self.services.reconciliation.check()
        self._check_parameters()

    async def identify(self) -> None:
        """Name the request, and find out who calls."""
        self.set_header("X-Request-Id", self.request_id)
        self.caller = await authenticate(self.request, self.services.identities, self.request_id)

    def _check_parameters(self) -> None:
        for name, values in self.request.query_arguments.items():
            known = name in self.parameters or name.startswith(tuple(self.prefixes))
            if not known and name not in IGNORED_PARAMETERS and any(values):
                allowed = ", ".join(self.parameters) or "none"
                raise InvalidRequest(f"unknown query parameter {name[:80]!r}", field=name[:80], allowed=allowed)

    @property
    def known(self) -> Caller:
        """The caller of a method that is not public."""
        if self.caller is None:
            raise Unauthorized("a token is needed")
        return self.caller

    async def replay(self, content: bytes) -> bool:
        """Give the first answer again when this write's Idempotency-Key was used before; True when that was done.

        `content` stands for the body. Raises InvalidRequest for what is no key, Conflict for another request's.
        """
        key = self.request.headers.get("Idempotency-Key")
        if key is None or self.caller is None:
            return False
        asked = b"\0".join(((self.request.method or "").encode(), (self.request.uri or "").encode(), content))
        digest = hashlib.sha256(asked).hexdigest()
        self._promise = Promise(self.caller.name, check_key(key), digest, self.request_id, self._accepted)
        kept = await self.services.promises.begin(self._promise)
        if kept is None:
            return False
        self.set_status(kept.status)
        if kept.location is not None:
            self.set_header("Location", kept.location)
        self.set_header("Idempotent-Replayed", "true")
        await self.finish(kept.body)
        return True

    def on_finish(self) -> None:
        if self._promise is not None:
            self.services.promises.end(self._promise)

    # ------------------------------------------------------------ what comes in

    def body(self, kind: type[T]) -> T:
        """The request's body, typed. Raises InvalidRequest with the field's path and what is allowed."""
        content_type = self.request.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise InvalidRequest("the body must be JSON", field="Content-Type", allowed="application/json")
        return decode(self.request.body, kind)

    def has_field(self, name: str) -> bool:
        """Whether the body is an object with this field, so that its kind can be told. Raises InvalidRequest."""
        return has_field(self.request.body, name)

    def whole_parameter(self, name: str, default: int, lowest: int, highest: int = MAX_SIZE) -> int:
        """A whole number of the query. Raises InvalidRequest."""
        text = self.get_query_argument(name, "")
        if not text:
            return default
        if not _WHOLE.fullmatch(text) or not lowest <= int(text) <= highest:
            raise InvalidRequest(f"invalid {name} {text[:40]!r}", field=name, allowed=f"{lowest} to {highest}")
        return int(text)

    def flag_parameter(self, name: str) -> bool:
        """A yes or no of the query. Raises InvalidRequest."""
        text = self.get_query_argument(name, "").lower()
        if text not in ("", "0", "1", "true", "false"):
            raise InvalidRequest(f"invalid {name} {text[:40]!r}", field=name, allowed="0 or 1")
        return text in ("1", "true")

    def recursion(self) -> int:
        """LXD's depth of an answer; what is no number counts as 0 (R11)."""
        text = self.get_query_argument("recursion", "0")
        return int(text) if text in ("0", "1", "2") else 0

    # ------------------------------------------------------------ what goes out

    def answer(self, metadata: Any, status: int = 200, location: str | None = None) -> None:
        """A sync envelope; 201 names what was made (R2)."""
        self.set_status(status)
        if location is not None:
            self.set_header("Location", location)
        self.finish(sync_envelope(orjson.dumps(metadata)))

    def answer_bytes(self, metadata: bytes) -> None:
        """A sync envelope around JSON that is ready."""
        self.finish(sync_envelope(metadata))

    async def answer_write(
        self, metadata: Any, secret: bool = False, status: int = 200, location: str | None = None
    ) -> None:
        """A sync envelope after a write, kept for its Idempotency-Key; a `secret` one is given once only."""
        if self._promise is not None:
            text = "the first answer held a secret, which is not kept: ask again with a new Idempotency-Key"
            refusal = error_envelope(409, text, {"code": Conflict.code, "field": "Idempotency-Key"})
            body = sync_envelope(orjson.dumps(metadata))
            kept = (409, None, orjson.dumps(refusal)) if secret else (status, location, body)
            await self.services.promises.answered(self._promise, *kept)
        self.answer(metadata, status, location)

    def answer_operation(self, operation: Operation) -> None:
        """An async envelope (R3 with the document's spellings)."""
        status, url, body = self._accepted(operation)
        self.set_status(status)
        self.set_header("Location", url)
        self.finish(body)

    def _accepted(self, operation: Operation) -> tuple[int, str, bytes]:
        url = f"/1.0/operations/{operation.id}"
        view = operation_view(operation, self.services.operations)
        return 202, url, async_envelope(url, operation.resources, view)

    def not_modified(self, etag: str) -> bool:
        """Set a list's ETag; True when the caller has that revision already, answered with 304."""
        self.set_header("ETag", f'"{etag}"')
        self.set_header("Cache-Control", "no-cache")
        wanted = [
            tag.strip().removeprefix("W/").strip('"')
            for tag in self.request.headers.get("If-None-Match", "").split(",")
        ]
        if etag not in wanted:
            return False
        self.set_status(304)
        self.finish()
        return True

    def compute_etag(self) -> str | None:
        return None

    # ------------------------------------------------------------ errors

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        if isinstance(error, VzfleetError):
            code, text, metadata = http_status(error), error.text, describe(error)
        else:
            code, text = status_code, str(error) if isinstance(error, HTTPError) else _reason(status_code)
            metadata = {"code": CODES.get(status_code, "internal")}
        # Tornado has dropped the headers that were set before the error.
        self.set_header("X-Request-Id", self.request_id)
        if code == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if code == 405:
            allowed = ", ".join(self.rights)
            self.set_header("Allow", allowed)
            text, metadata = f"{self.request.method} is not served here", {**metadata, "allowed": allowed}
        self.set_status(code)
        self.finish(orjson.dumps(error_envelope(code, text, metadata)))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if isinstance(value, (VzfleetError, HTTPError)):
            return
        log.error("a request failed by a fault of ours", extra={"request": self.request_id}, exc_info=(typ, value, tb))


class Unknown(Handler):
    """Any path that is no route."""

    async def prepare(self) -> None:
        await self.identify()
        authorize(self.caller, Right.READ)
        raise NotFound(f"no such path: {self.request.path[:200]}", field="path")


class TooLargeBody(Handler):
    """Any request whose body is over the limit."""

    async def prepare(self) -> None:
        await self.identify()
        authorize(self.caller, Right.READ)
        raise TooLarge("the body is too large", field="body", allowed=f"at most {MAX_BODY} bytes")


def _reason(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return "error"
