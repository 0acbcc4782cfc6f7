"""What a built-in image is to the controller: properties in, a staged file out."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from common.errors import InvalidRequest
from controller.images.files import ImageFiles, StagedImage

ReportProgress = Callable[[str, int | None], None]
"""Called with a stage ("installing packages") and a percentage, or None where that is not known."""

PROPERTIES = ("os", "release", "architecture")
FIELD = "source.properties"
# Kernel names (uname -m, as LXD writes them) to Debian's.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "i386", "armv7l": "armhf", "ppc64le": "ppc64el"}


@dataclass(frozen=True)
class BuiltImage:
    """A built image: `staged` is finished and to be kept; `layout` is `unified` or `rootfs`."""

    staged: StagedImage
    layout: str
    properties: dict[str, str] = field(default_factory=dict)


class Builder(ABC):
    """Makes one kind of image on this host."""

    os: str

    def matches(self, properties: Mapping[str, str]) -> bool:
        """Whether this builder is the one for `properties["os"]`."""
        return properties.get("os", "").lower() == self.os

    @abstractmethod
    def check(self, properties: Mapping[str, str]) -> None:
        """Refuse what cannot be built: InvalidRequest or NotFound naming `source.properties.<name>`."""

    @abstractmethod
    def key(self, properties: Mapping[str, str]) -> str:
        """The same for all checked properties that lead to the same image; changes with what it is made from."""

    @abstractmethod
    async def build(self, properties: Mapping[str, str], files: ImageFiles, report: ReportProgress) -> BuiltImage:
        """Make the image from checked properties. Raises DriverFailed, DeadlinePassed, NoSpace.

        When it fails or is cancelled, no file, process or mount is left.
        """


def host_architecture() -> str:
    """This host's architecture as LXD and the kernel name it: `x86_64`."""
    return platform.machine()


def debian_architecture(name: str) -> str:
    """Debian's name of an architecture: `amd64` for `x86_64`."""
    return _ARCHITECTURES.get(name, name)


def check_known(properties: Mapping[str, str]) -> None:
    """Refuse properties that mean nothing, and architectures that this host is not."""
    for name in properties:
        if name not in PROPERTIES:
            raise InvalidRequest(
                f"unknown property {name[:80]!r}", field=f"{FIELD}.{name[:80]}", allowed=", ".join(PROPERTIES)
            )
    wanted, own = properties.get("architecture", host_architecture()), host_architecture()
    if debian_architecture(wanted) != debian_architecture(own):
        allowed = " or ".join(sorted({own, debian_architecture(own)}))
        raise InvalidRequest(
            f"no images of architecture {wanted[:80]!r} can be built here",
            field=f"{FIELD}.architecture",
            allowed=allowed,
        )
