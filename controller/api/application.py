"""All routes joined, checked at import; the HTTPS server's limits."""

from __future__ import annotations

import logging
import ssl
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest
from tornado.web import Application, RequestHandler

from controller.api import (
    containers,
    events,
    image_aliases,
    image_export,
    images,
    internal,
    metadata,
    nodes,
    operations,
    placement,
    reconciliation,
    server,
    snapshots,
    states,
    web,
)
from controller.api.base import Handler, TooLargeBody, Unknown
from controller.api.identity import Right
from controller.api.limits import MAX_BODY, Bounded
from controller.api.services import Services

log = logging.getLogger(__name__)
MAX_HEADER = 16 * 1024
IDLE_TIMEOUT = 75.0
BODY_TIMEOUT = 60.0
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")

ROUTES: list[tuple[str, type[Handler]]] = [
    *server.routes,
    *containers.routes,
    *states.routes,
    *snapshots.routes,
    *image_aliases.routes,
    *image_export.routes,
    *images.routes,
    *nodes.routes,
    *operations.routes,
    *events.routes,
    *placement.routes,
    *reconciliation.routes,
    *metadata.routes,
    *internal.routes,
    *web.routes,
]


def check_routes() -> None:
    """Raise TypeError unless every method that a handler has declares its right, and no other does."""
    for pattern, handler in ROUTES:
        served = {
            name for name in METHODS if getattr(handler, name.lower()) is not getattr(RequestHandler, name.lower())
        }
        if served != handler.rights.keys() or not all(isinstance(right, Right) for right in handler.rights.values()):
            raise TypeError(f"{pattern}: {handler.__name__} serves {served}, its rights name {set(handler.rights)}")


check_routes()


class BoundedApplication(Application):
    """An application that answers 413 to a body over the limit, but for handlers that take it as it comes."""

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        delegate = super().find_handler(request, **kwargs)
        if delegate.stream_request_body:
            return delegate
        refusing: HTTPMessageDelegate = self.get_handler_delegate(request, TooLargeBody, delegate.handler_kwargs)
        return Bounded(request, delegate, refusing)


def make_application(services: Services) -> Application:
    """The Tornado application."""
    arguments = {"services": services}
    return BoundedApplication(
        [(pattern, handler, arguments) for pattern, handler in ROUTES],
        default_handler_class=Unknown,
        default_handler_args=arguments,
        log_function=_log_request,
    )


def make_server(services: Services, context: ssl.SSLContext) -> HTTPServer:
    """The HTTPS server, to be bound by the caller."""
    return HTTPServer(
        make_application(services),
        ssl_options=context,
        max_body_size=MAX_BODY,
        max_header_size=MAX_HEADER,
        max_buffer_size=4 * MAX_BODY,
        chunk_size=256 * 1024,
        idle_connection_timeout=IDLE_TIMEOUT,
        body_timeout=BODY_TIMEOUT,
    )


def _log_request(handler: RequestHandler) -> None:
    code, request = handler.get_status(), handler.request
    caller = getattr(handler, "caller", None)
    level = logging.INFO if request.method != "GET" or code >= 400 else logging.DEBUG
    log.log(
        level,
        "request",
        extra={
            "request": getattr(handler, "request_id", ""),
            "method": request.method,
            "path": request.path,
            "status": code,
            "caller": caller.name if caller else None,
            "address": request.remote_ip,
            "duration_ms": round(1000 * request.request_time(), 2),
        },
    )
