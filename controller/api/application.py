"""All routes joined, checked at import; the HTTPS server's limits."""

from __future__ import annotations

import logging
import ssl

from tornado.httpserver import HTTPServer
from tornado.web import Application, RequestHandler

from controller.api import (
    containers,
    images,
    internal,
    metadata,
    nodes,
    operations,
    placement,
    server,
    snapshots,
    states,
)
from controller.api.base import Handler, Right, Services, Unknown

log = logging.getLogger(__name__)
MAX_BODY = 1024 * 1024
MAX_HEADER = 16 * 1024
IDLE_TIMEOUT = 75.0
BODY_TIMEOUT = 60.0
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")

ROUTES: list[tuple[str, type[Handler]]] = [
    *server.routes,
    *containers.routes,
    *states.routes,
    *snapshots.routes,
    *images.routes,
    *nodes.routes,
    *operations.routes,
    *placement.routes,
    *metadata.routes,
    *internal.routes,
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


def make_application(services: Services) -> Application:
    """The Tornado application."""
    arguments = {"services": services}
    return Application(
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
