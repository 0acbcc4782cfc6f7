"""/ui/: the dashboard's static files. They hold no data; what they show they ask of the API with the user's token."""

from __future__ import annotations

from pathlib import Path

from common.errors import NotFound
from controller.api.base import Handler
from controller.api.identity import Right

FILES = Path(__file__).resolve().parents[1] / "web"
TYPES = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class Dashboard(Handler):
    """GET of one of the files; their list is closed."""

    rights = {"GET": Right.PUBLIC}

    def get(self, name: str) -> None:
        name = name or "index.html"
        if name not in TYPES:
            raise NotFound(f"no such file: {name[:80]}", field="path")
        self.set_header("Content-Type", f"{TYPES[name]}; charset=utf-8")
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-cache")
        self.finish((FILES / name).read_bytes())


routes = [(r"/ui/([^/]*)", Dashboard)]
