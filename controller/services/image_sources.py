"""Which image a request means that wants one: of here, to be built, or of a server."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from common.errors import Forbidden, InvalidRequest, NotFound
from controller.fleet import Fleet
from controller.images.https import check_url
from controller.images.servers import ImageServers, RemoteSource
from controller.images.simplestreams import ARCHITECTURES, canonical
from controller.images.wishes import Wish, find
from controller.services.caller import Caller
from controller.services.images import Images, Resolved, require_one_way
from controller.services.requests import ImageSource

DEFAULT_SERVER = "images"


class ImageSources:
    """Finds out what sources mean. `urls` maps the names of the configured servers to their https URLs."""

    def __init__(self, fleet: Fleet, images: Images, servers: ImageServers, urls: Mapping[str, str]) -> None:
        self._fleet = fleet
        self._images = images
        self._servers = servers
        self.urls = {name: _server_url(url, f"image_servers.{name}") for name, url in urls.items()}

    def resolve(self, source: ImageSource, caller: Caller | None = None, node: str | None = None) -> Resolved:
        """The image that a source means: of a server that it names, else of here, else the default server's.

        Raises InvalidRequest or NotFound naming the field, Forbidden for another server than those configured.
        """
        require_one_way(source)
        if source.server is None:
            try:
                return self._images.resolve(source)
            except NotFound as error:
                elsewhere = self._elsewhere(source)
                if elsewhere is None or error.field not in ("source.alias", "source.properties.os"):
                    raise
                source = elsewhere
        remote = self.remote(source, caller, node)
        self.expect(remote)
        requested = {"alias": source.alias, "fingerprint": source.fingerprint, **(source.properties or {})}
        return Resolved(
            fingerprint=None,
            source=None,
            properties={},
            architecture=remote.wish.architecture or None,
            requested={name: value for name, value in requested.items() if value} | {"server": remote.name},
            remote=remote,
        )

    def _elsewhere(self, source: ImageSource) -> ImageSource | None:
        """A source that is not here, as one of a server: `images:ubuntu/22.04`, or the default one's."""
        server, colon, alias = (source.alias or "").partition(":")
        if colon and server in self.urls:
            return msgspec.structs.replace(source, server=server, alias=alias)
        if DEFAULT_SERVER in self.urls:
            return msgspec.structs.replace(source, server=DEFAULT_SERVER)
        return None

    def remote(self, source: ImageSource, caller: Caller | None, node: str | None = None) -> RemoteSource:
        """A source with a server, checked. Raises NotFound, InvalidRequest, Forbidden."""
        name, url = self._server(source.server or "", caller)
        properties = dict(source.properties or {})
        architecture = _architecture_of(source.alias or "") or canonical(properties.get("architecture", ""))
        if source.fingerprint is None:
            architecture = architecture or self._architecture(node)
        if source.fingerprint is not None and not _is_prefix(source.fingerprint):
            raise InvalidRequest(
                "invalid fingerprint", field="source.fingerprint", allowed="12 to 64 hexadecimal digits"
            )
        wish = Wish(source.alias or "", (source.fingerprint or "").lower(), properties, architecture)
        return RemoteSource(url, name, wish)

    def _server(self, given: str, caller: Caller | None) -> tuple[str, str]:
        if given in self.urls:
            return given, self.urls[given]
        known = ", ".join(sorted(self.urls)) or "none is configured"
        if "://" not in given:
            raise NotFound(f"no image server is called {given[:80]!r}", field="source.server", allowed=known)
        url = _server_url(given, "source.server")
        for name, configured in self.urls.items():
            if configured == url:
                return name, url
        if caller is None or caller.role != "admin":
            raise Forbidden("only an administrator may name a server that is not configured", allowed=known)
        return url, url

    def _architecture(self, node: str | None) -> str:
        """What runs on the node, else on most of the nodes; empty while that is not known."""
        nodes = self._fleet.nodes.values()
        facts = [live.record.facts for live in nodes if node is None or live.record.name == node]
        found = [one.architecture for one in facts if one is not None]
        return max(sorted(set(found)), key=found.count, default="")

    def expect(self, remote: RemoteSource) -> None:
        """Raise NotFound for what its server does not have, as far as that was asked lately; it is not asked now."""
        catalogue = self._servers.cached(remote.url)
        if catalogue is not None:
            find(catalogue, remote.wish)

    def name_of(self, url: str) -> str:
        """What a server is called here; its URL if it has no name."""
        return next((name for name, known in self.urls.items() if known == url), url)


def _server_url(url: str, field: str) -> str:
    """A server's URL without a slash at its end. Raises InvalidRequest."""
    if "?" in check_url(url, field):
        raise InvalidRequest(f"invalid URL {url[:200]!r}", field=field, allowed="an https URL without a query")
    return url.rstrip("/")


def _architecture_of(alias: str) -> str:
    """The architecture that an alias names at its end; empty when it names none."""
    last = alias.rpartition("/")[2]
    return canonical(last) if last in ARCHITECTURES or last in ARCHITECTURES.values() else ""


def _is_prefix(fingerprint: str) -> bool:
    return 12 <= len(fingerprint) <= 64 and all(mark in "0123456789abcdef" for mark in fingerprint.lower())
