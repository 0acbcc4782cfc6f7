"""Which image of a server somebody means. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from common.errors import NotFound, Unsupported
from controller.images.simplestreams import Catalogue, RemoteImage, canonical

_VARIANT = "default"


class Wish(Struct, frozen=True):
    """Which image of a server is meant: by an alias, a fingerprint's beginning, or properties."""

    alias: str = ""
    fingerprint: str = ""
    properties: dict[str, str] = {}
    architecture: str = ""

    @property
    def text(self) -> str:
        """In words."""
        if self.alias:
            return f"alias {self.alias[:128]!r}"
        if self.fingerprint:
            return f"fingerprint {self.fingerprint[:64]!r}"
        return ", ".join(f"{name}={value}" for name, value in sorted(self.properties.items()))[:300]


def find(catalogue: Catalogue, wish: Wish) -> RemoteImage:
    """The newest image that is meant. Raises NotFound, Unsupported (only in forms that cannot be unpacked here)."""
    found = [image for image in catalogue.images if is_meant(image, wish)]
    if found:
        # Where properties leave the variant open, the default one is meant.
        return max(found, key=lambda image: (_is_default(image), image.serial, image.product))
    for name, (aliases, why) in catalogue.unusable.items():
        if wish.alias and (wish.alias in aliases or wish.alias.rpartition("/")[0] in aliases):
            raise Unsupported(f"{name} cannot be used: {why}", field="source.alias")
    raise NotFound(
        f"no image for {wish.text}" + (f" of architecture {wish.architecture}" if wish.architecture else ""),
        field="source",
    )


def is_meant(image: RemoteImage, wish: Wish) -> bool:
    """Whether an image is one of those that are meant."""
    if wish.fingerprint:
        return image.fingerprint.startswith(wish.fingerprint.lower())
    if wish.alias:
        return _has_alias(image, wish.alias, wish.architecture)
    return _has_properties(image, wish.properties, wish.architecture)


def _has_alias(image: RemoteImage, alias: str, architecture: str) -> bool:
    """An alias as it stands means the architecture that is wanted; with `/amd64` at its end that one."""
    if alias in image.aliases:
        return not architecture or image.architecture == architecture
    base, _, last = alias.rpartition("/")
    return base in image.aliases and canonical(last) == image.architecture


def _has_properties(image: RemoteImage, wanted: Mapping[str, str], architecture: str) -> bool:
    if "architecture" not in wanted and architecture and image.architecture != architecture:
        return False
    has = image.properties
    for name, value in wanted.items():
        folded = value.lower()
        if name == "architecture":
            if canonical(folded) != image.architecture:
                return False
        elif name == "release":
            # `22.04` and `jammy` are the same: the one stands in the release or version, the other in the aliases.
            names = {has.get("release", "").lower(), has.get("version", "").lower()}
            names |= {part.lower() for each in image.aliases for part in each.split("/")[1:2]}
            if folded not in names:
                return False
        elif has.get(name, "").lower() != folded:
            return False
    return True


def _is_default(image: RemoteImage) -> bool:
    return image.properties.get("variant", _VARIANT) == _VARIANT
