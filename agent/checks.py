"""The arguments of commands, checked again on the node before anything is touched."""

from __future__ import annotations

import re

from agent.https import check_path, check_token
from common.commands import (
    Arguments,
    CopyContainer,
    CreateContainer,
    DropImage,
    EnsureImage,
    ReceiveContainer,
    SendContainer,
    StopContainer,
)
from common.errors import InvalidRequest
from common.names import check_container_id, check_fingerprint, check_hostname, check_snapshot_name
from common.options import check_config
from common.reports import ContainerSpec

MAX_IMAGE = 1 << 42
MAX_STOP_TIMEOUT = 24 * 3600.0
LAYOUTS = ("unified", "rootfs")
# The second digit is even where bit 0 of the first octet is clear: a unicast address (IEEE 802, 8.2).
_UNICAST_HWADDR = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


def check_arguments(arguments: Arguments) -> None:
    """Raise InvalidRequest when a name, path, number or configuration may not reach the driver."""
    container: str | None = getattr(arguments, "container", None)
    snapshot: str | None = getattr(arguments, "snapshot", None)
    spec: ContainerSpec | None = getattr(arguments, "spec", None)
    if container is not None:
        check_container_id(container, "container")
    if snapshot is not None:
        check_snapshot_name(snapshot, "snapshot")
    if spec is not None:
        check_spec(spec)
    match arguments:
        case EnsureImage():
            _check_image(arguments)
        case DropImage():
            check_fingerprint(arguments.fingerprint)
        case CreateContainer() if arguments.image is not None:
            check_fingerprint(arguments.image, "image")
        case CopyContainer():
            check_container_id(arguments.source, "source")
        case SendContainer() | ReceiveContainer():
            check_path(arguments.path, "path")
            check_token(arguments.token, "token")
        case StopContainer() if not 0 <= arguments.timeout <= MAX_STOP_TIMEOUT:
            raise InvalidRequest("invalid time-out", field="timeout", allowed=f"0 to {MAX_STOP_TIMEOUT:g} seconds")


def check_spec(spec: ContainerSpec) -> None:
    """Raise InvalidRequest when a container's description holds anything that may not stand in LXC's configuration."""
    check_container_id(spec.id, "spec.id")
    check_hostname(spec.hostname, "spec.hostname")
    if not _UNICAST_HWADDR.fullmatch(spec.hwaddr):
        allowed = "six pairs of lower-case hexadecimal digits, a unicast address"
        raise InvalidRequest("invalid hardware address", field="spec.hwaddr", allowed=allowed)
    check_config(spec.config, "spec.config")


def _check_image(arguments: EnsureImage) -> None:
    image = arguments.image
    check_fingerprint(image.fingerprint, "image.fingerprint")
    if image.layout not in LAYOUTS:
        raise InvalidRequest("unknown image layout", field="image.layout", allowed=" or ".join(LAYOUTS))
    if not 0 < image.size <= MAX_IMAGE:
        raise InvalidRequest("invalid image size", field="image.size", allowed=f"1 to {MAX_IMAGE}")
    check_path(image.path, "image.path")
    check_token(image.token, "image.token")
