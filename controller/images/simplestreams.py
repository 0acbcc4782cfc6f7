"""The simplestreams format of image servers (`streams/v1/index.json`), read from hostile documents. Pure.

An index names files of products; a product (`ubuntu:jammy:amd64:default`) has versions, a version has items, which are
files. LXD's images are of two items, metadata and root file system, whose sha256 together is the fingerprint, or of one
that holds both (LXD's doc/reference/image_servers, shared/simplestreams/products.go).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct

from common.errors import InvalidRequest
from common.names import FINGERPRINT, has_control_characters

INDEX = "streams/v1/index.json"
MAX_FILES = 16
"""Files of products of one index that are read."""
MAX_SIZE = 2**42
UNIFIED = ("incus_combined.tar.gz", "lxd_combined.tar.gz")
METADATA = ("incus.tar.xz", "lxd.tar.xz")
ROOT = "root.tar.xz"
PLAIN = re.compile(r"[^\x00-\x20\x7f]{1,128}")
_PATH = re.compile(r"[A-Za-z0-9_.~+=@,:%-]{1,255}(/[A-Za-z0-9_.~+=@,:%-]{1,255}){0,15}")
# Debian's names of architectures, which these servers use, and the kernel's, which the rest of the project uses.
ARCHITECTURES = {
    "amd64": "x86_64",
    "arm64": "aarch64",
    "i386": "i686",
    "armhf": "armv7l",
    "ppc64el": "ppc64le",
}

Text = Annotated[str, Meta(max_length=1024)]
Key = Annotated[str, Meta(max_length=256)]
T = TypeVar("T")


class Item(Struct, frozen=True):
    """A file. `combined_*` is the sha256 of this one and the root file system's file, one after the other."""

    ftype: Text = ""
    path: Text = ""
    sha256: Text = ""
    size: Annotated[int, Meta(ge=0, le=MAX_SIZE)] = 0
    combined_sha256: Text = ""
    combined_rootxz_sha256: Text = ""


class Version(Struct, frozen=True):
    """One build of a product."""

    items: Annotated[dict[Key, Item], Meta(max_length=128)] = {}
    label: Text = ""


class Product(Struct, frozen=True):
    """An operating system in a release, an architecture and a variant; `aliases` are separated by commas."""

    versions: Annotated[dict[Key, Version], Meta(max_length=2000)] = {}
    aliases: Annotated[str, Meta(max_length=4096)] = ""
    arch: Text = ""
    os: Text = ""
    release: Text = ""
    release_title: Text = ""
    version: Text = ""
    variant: Text = ""


class _Products(Struct, frozen=True):
    format: Text = ""
    datatype: Text = ""
    products: Annotated[dict[Key, Product], Meta(max_length=50_000)] = {}


class _Stream(Struct, frozen=True):
    path: Text = ""
    datatype: Text = ""
    format: Text = ""


class _Index(Struct, frozen=True):
    index: Annotated[dict[Key, _Stream], Meta(max_length=1000)] = {}
    format: Text = ""


class RemoteFile(Struct, frozen=True):
    """A file to be fetched: its path below the server's URL."""

    path: str
    sha256: str
    size: int


class RemoteImage(Struct, frozen=True):
    """An image that a server has: one file, or the metadata's and the root file system's. `serial` is its version."""

    fingerprint: str
    product: str
    serial: str
    aliases: tuple[str, ...]
    properties: dict[str, str]
    files: tuple[RemoteFile, ...]

    @property
    def architecture(self) -> str:
        """As the kernel names it."""
        return canonical(self.properties.get("architecture", ""))

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


class Catalogue(Struct, frozen=True):
    """What a server has. `images` are those that can be used; `unusable` are products that have none, and why."""

    images: tuple[RemoteImage, ...] = ()
    unusable: dict[str, tuple[tuple[str, ...], str]] = {}


def canonical(architecture: str) -> str:
    """The kernel's name of an architecture for Debian's."""
    return ARCHITECTURES.get(architecture, architecture)


# ---------------------------------------------------------------- reading


def read_index(content: bytes) -> list[str]:
    """The paths of an index's files of images. Raises InvalidRequest."""
    index = _decode(content, _Index, "index")
    if index.format != "index:1.0":
        raise InvalidRequest(f"unknown format {index.format[:80]!r} of the index", allowed="index:1.0")
    found = [each.path for each in index.index.values() if each.datatype == "image-downloads"]
    if len(found) > MAX_FILES:
        raise InvalidRequest("the index names too many files", allowed=f"at most {MAX_FILES}")
    return [check_path(path) for path in dict.fromkeys(found)]


def read_products(content: bytes) -> Catalogue:
    """What a file of products holds. Raises InvalidRequest."""
    read = _decode(content, _Products, "products")
    if read.format != "products:1.0":
        raise InvalidRequest(f"unknown format {read.format[:80]!r} of the products", allowed="products:1.0")
    images: list[RemoteImage] = []
    unusable: dict[str, tuple[tuple[str, ...], str]] = {}
    for name, product in read.products.items():
        found = list(_images_of(name, product))
        images += found
        if not found and product.versions:
            unusable[name] = (_all_aliases(product), _why_unusable(product))
    return Catalogue(tuple(images), unusable)


def join(catalogues: Sequence[Catalogue]) -> Catalogue:
    """Several files of products as one."""
    images = tuple(image for each in catalogues for image in each.images)
    return Catalogue(images, {name: why for each in catalogues for name, why in each.unusable.items()})


def check_path(path: str) -> str:
    """Return a path that leads to a file below the server's URL, else raise InvalidRequest."""
    if not _PATH.fullmatch(path) or any(part in (".", "..") for part in path.split("/")) or "%" in path:
        raise InvalidRequest(f"the image server names a path that is not followed: {path[:200]!r}")
    return path


def url_of(server: str, path: str) -> str:
    """The URL of a checked path of a server."""
    return f"{server.rstrip('/')}/{quote(path)}"


def _decode(content: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the image server's {what} cannot be read: {str(error)[:300]}") from None


def _images_of(name: str, product: Product) -> Iterator[RemoteImage]:
    for serial, version in product.versions.items():
        if (made := _files_of(version)) is not None:
            fingerprint, files = made
            properties = _properties(product, serial, version)
            yield RemoteImage(fingerprint, name, serial, _all_aliases(product), properties, files)


def _files_of(version: Version) -> tuple[str, tuple[RemoteFile, ...]] | None:
    """Fingerprint and files of a version; None when it has no archive that can be unpacked here."""
    by_type = {item.ftype: item for item in version.items.values()}
    root = by_type.get(ROOT)
    for kind in METADATA:
        if root is not None and (metadata := by_type.get(kind)) is not None:
            fingerprint = metadata.combined_rootxz_sha256 or metadata.combined_sha256
            files = (_file(metadata), _file(root))
            if FINGERPRINT.fullmatch(fingerprint) and files[0] is not None and files[1] is not None:
                return fingerprint, (files[0], files[1])
    for kind in UNIFIED:
        if (item := by_type.get(kind)) is not None and (file := _file(item)) is not None:
            return file.sha256, (file,)
    return None


def _file(item: Item) -> RemoteFile | None:
    try:
        path = check_path(item.path)
    except InvalidRequest:
        return None
    if not FINGERPRINT.fullmatch(item.sha256) or item.size == 0:
        return None
    return RemoteFile(path, item.sha256, item.size)


def _why_unusable(product: Product) -> str:
    kinds = sorted({item.ftype for version in product.versions.values() for item in version.items.values()})
    shown = ", ".join(kind[:40] for kind in kinds[:8]) or "no files"
    return f"it is offered only as {shown}; tar archives are needed ({METADATA[1]} with {ROOT}, or {UNIFIED[1]})"


def _all_aliases(product: Product) -> tuple[str, ...]:
    return tuple(alias for alias in map(str.strip, product.aliases.split(",")) if PLAIN.fullmatch(alias))[:64]


def _properties(product: Product, serial: str, version: Version) -> dict[str, str]:
    """What the image is, as LXD names it; what would break a line is left out."""
    given = {
        "os": product.os,
        "release": product.release,
        "version": product.version,
        "variant": product.variant,
        "architecture": canonical(product.arch),
        "label": version.label,
        "serial": serial,
        "description": " ".join(part for part in (product.os, product.release, product.arch, f"({serial})") if part),
    }
    return {name: value for name, value in given.items() if value and not has_control_characters(value)}
