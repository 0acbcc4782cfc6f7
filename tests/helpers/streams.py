"""An image server of the tests: simplestreams over HTTPS, from images that are made here, misbehaving on request."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.https_server import Authority, Handler, Server, https_server, make_authority

PRODUCTS = "streams/v1/images.json"


@cache
def server_authority() -> Authority:
    """The authority of all image servers of a process; they are called localhost."""
    return make_authority("localhost")


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def archive(files: dict[str, bytes | None], compression: str = "xz") -> bytes:
    """A tar archive; None is a directory."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode=f"w:{compression}" if compression else "w") as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.mode = 0o755
            if content is None:
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return output.getvalue()


def metadata_of(os: str, release: str, architecture: str = "x86_64") -> bytes:
    """An image's metadata.yaml."""
    text = f"architecture: {architecture}\ncreation_date: 1700000000\nproperties:\n  os: {os}\n  release: {release}\n"
    return text.encode()


def root(mark: str, prefix: str = "") -> dict[str, bytes | None]:
    """A root file system that nothing else has."""
    init = b"\x7fELF\x02\x01\x01" + b"\0" * 57
    return {
        f"{prefix}bin": None,
        f"{prefix}etc": None,
        f"{prefix}etc/mark": mark.encode(),
        f"{prefix}sbin": None,
        f"{prefix}sbin/init": init,
    }


@dataclass(frozen=True)
class SplitImage:
    """LXD's two files of an image."""

    metadata: bytes
    root: bytes

    @property
    def fingerprint(self) -> str:
        """The sha256 of both, one after the other."""
        return sha256(self.metadata + self.root)


def split_image(mark: str, os: str = "tiny", release: str = "1", filler: int = 0, rootfs: bytes = b"") -> SplitImage:
    """An image as image servers have it; `filler` bytes that do not compress make it longer."""
    files = root(mark)
    if filler:
        # Bytes that are always the same, and that no compression makes smaller.
        files["etc/filler"] = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(filler // 32))
    metadata = archive({"metadata.yaml": metadata_of(os, release), "templates": None})
    return SplitImage(metadata, rootfs or archive(files))


@dataclass
class Streams:
    """What a server has, and how it behaves. `files` are by path; `cuts` are bytes after which an answer breaks off."""

    files: dict[str, bytes] = field(default_factory=dict)
    products: dict[str, Any] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    held: dict[str, threading.Event] = field(default_factory=dict)
    """Answers that stop in their midst until the event is set."""
    down: bool = False
    url: str = ""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    answering: threading.Event = field(default_factory=threading.Event)
    """Set when an answer that is held has begun."""

    def add(self, product: str, serial: str, image: SplitImage, *, aliases: str = "", **fields: str) -> SplitImage:
        """A version of a product (`ubuntu:jammy:amd64:default`) in two files."""
        base = f"images/{product.replace(':', '/')}/{serial}"
        items = {
            "lxd.tar.xz": self._item("lxd.tar.xz", f"{base}/lxd.tar.xz", image.metadata),
            "root.tar.xz": self._item("root.tar.xz", f"{base}/root.tar.xz", image.root),
        }
        items["lxd.tar.xz"]["combined_rootxz_sha256"] = image.fingerprint
        self._version(product, serial, items, aliases, fields)
        return image

    def add_unified(self, product: str, serial: str, content: bytes, *, aliases: str = "", **fields: str) -> str:
        """A version of a product in one file; its fingerprint."""
        path = f"images/{product.replace(':', '/')}/{serial}/lxd_combined.tar.gz"
        items = {"lxd_combined.tar.gz": self._item("lxd_combined.tar.gz", path, content)}
        self._version(product, serial, items, aliases, fields)
        return sha256(content)

    def _item(self, kind: str, path: str, content: bytes) -> dict[str, Any]:
        self.files[path] = content
        return {"ftype": kind, "path": path, "sha256": sha256(content), "size": len(content)}

    def _version(self, product: str, serial: str, items: dict[str, Any], aliases: str, fields: dict[str, str]) -> None:
        os, release, arch, variant = product.split(":")
        entry = self.products.setdefault(
            product,
            {"os": os.capitalize(), "release": release, "arch": arch, "variant": variant, "versions": {}, **fields},
        )
        entry["aliases"] = aliases or entry.get("aliases", f"{os}/{release}")
        entry["versions"][serial] = {"items": items}

    def content(self, path: str) -> bytes | None:
        """The file at a path; the documents are made as they are asked for."""
        if path == "streams/v1/index.json":
            stream = {"datatype": "image-downloads", "format": "products:1.0", "path": PRODUCTS}
            return json.dumps({"format": "index:1.0", "index": {"images": stream}}).encode()
        if path == PRODUCTS and path not in self.files:
            return json.dumps({"format": "products:1.0", "products": self.products}).encode()
        return self.files.get(path)

    def asked(self, path: str) -> int:
        """How often a path was asked for, by its end."""
        return sum(each.endswith(path) for each, _ in self.requests)

    def answer(self, handler: Handler) -> None:
        """Answer one request."""
        path = handler.path.lstrip("/")
        self.requests.append((path, dict(handler.headers)))
        if self.down:
            handler.reply(503)
            return
        if path in self.redirects:
            handler.reply(302, location=self.redirects[path])
            return
        content = self.content(path)
        if content is None:
            handler.reply(404)
            return
        etag = f'"{sha256(content)[:16]}"'
        if handler.headers.get("If-None-Match") == etag:
            handler.reply(304, etag=etag)
            return
        self._send(handler, path, content, etag)

    def _send(self, handler: Handler, path: str, content: bytes, etag: str) -> None:
        start, status, headers = 0, 200, {"etag": etag}
        wanted = handler.headers.get("Range")
        if wanted and handler.headers.get("If-Range") == etag:
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            headers["content_range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        name = path.rpartition("/")[2]
        if name in self.held:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(rest)))
            handler.end_headers()
            handler.wfile.write(rest[: len(rest) // 2])
            self.answering.set()
            self.held[name].wait(20)
            handler.wfile.write(rest[len(rest) // 2 :])
        elif self.cuts.get(name, len(rest)) < len(rest):
            handler.cut(status, rest[: self.cuts[name]], len(rest), **headers)
        else:
            handler.reply(status, rest, **headers)


@contextmanager
def streams_server(directory: Path, prepare: Callable[[Streams], None] | None = None) -> Iterator[Streams]:
    """A server on loopback until the end of the block; its CA is `directory/image-ca.pem`."""
    streams = Streams()
    if prepare is not None:
        prepare(streams)
    (directory / "image-ca.pem").write_text(server_authority().ca)
    with https_server(directory, streams.answer, server_authority()) as server:
        streams.url = url_of(server)
        try:
            yield streams
        finally:
            for event in streams.held.values():
                event.set()


def url_of(server: Server) -> str:
    """Where a server with the certificate of `server_authority` is."""
    return f"https://localhost:{server.server_address[1]}"
