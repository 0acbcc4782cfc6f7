"""The arguments of commands, checked again on the node before anything is touched."""

from __future__ import annotations

import re

from agent.https import check_path, check_token
from common.commands import (
    COMPRESSION_ALGORITHMS,
    FORMATS,
    Arguments,
    CopyContainer,
    CreateContainer,
    DropImage,
    EndTransfer,
    EnsureImage,
    PublishContainer,
    ReceiveContainer,
    RenameSnapshot,
    Route,
    SendContainer,
    StopContainer,
)
from common.errors import InvalidRequest
from common.keys import check_public_key
from common.names import (
    TRANSFER,
    TRANSFER_RULE,
    check_container_id,
    check_fingerprint,
    check_hostname,
    check_node_name,
    check_snapshot_name,
    has_control_characters,
)
from common.options import check_config
from common.reports import ContainerSpec

MAX_IMAGE = 1 << 42
MAX_STOP_TIMEOUT = 24 * 3600.0
LAYOUTS = ("unified", "rootfs", "split")
MOST_ROUNDS = 100
_ADDRESS = re.compile(
    r"tcp://(?:\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?):([1-9][0-9]{0,4})"
)
# The second digit is even where bit 0 of the first octet is clear: a unicast address (IEEE 802, 8.2).
_UNICAST_HWADDR = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


def check_arguments(arguments: Arguments) -> None:
    """Raise InvalidRequest when a name, path, number or configuration may not reach the driver."""
    _check_common(arguments)
    match arguments:
        case EnsureImage():
            _check_image(arguments)
        case DropImage():
            check_fingerprint(arguments.fingerprint)
        case PublishContainer():
            _check_publication(arguments)
        case CreateContainer() if arguments.image is not None:
            check_fingerprint(arguments.image, "image")
        case CopyContainer():
            check_container_id(arguments.source, "source")
        case SendContainer() | ReceiveContainer():
            _check_format(arguments.format)
            check_route(arguments.route)
        case EndTransfer():
            _check_transfer(arguments.transfer, "transfer")
        case RenameSnapshot():
            check_snapshot_name(arguments.new, "new")
        case StopContainer() if not 0 <= arguments.timeout <= MAX_STOP_TIMEOUT:
            raise InvalidRequest("invalid time-out", field="timeout", allowed=f"0 to {MAX_STOP_TIMEOUT:g} seconds")


def _check_common(arguments: Arguments) -> None:
    container: str | None = getattr(arguments, "container", None)
    snapshot: str | None = getattr(arguments, "snapshot", None)
    spec: ContainerSpec | None = getattr(arguments, "spec", None)
    if container is not None:
        check_container_id(container, "container")
    if snapshot is not None:
        check_snapshot_name(snapshot, "snapshot")
    if spec is not None:
        check_spec(spec)


def _check_publication(arguments: PublishContainer) -> None:
    check_path(arguments.path, "path")
    check_token(arguments.token, "token")
    if arguments.compression not in COMPRESSION_ALGORITHMS:
        allowed = ", ".join(COMPRESSION_ALGORITHMS)
        raise InvalidRequest("unknown compression", field="compression", allowed=allowed)
    texts = (arguments.architecture, *arguments.properties, *arguments.properties.values())
    if any(has_control_characters(text) for text in texts):
        raise InvalidRequest("a control character in a property", field="properties", allowed="printable text")


def check_spec(spec: ContainerSpec) -> None:
    """Raise InvalidRequest when a container's description holds anything that may not stand in LXC's configuration."""
    check_container_id(spec.id, "spec.id")
    check_hostname(spec.hostname, "spec.hostname")
    if not _UNICAST_HWADDR.fullmatch(spec.hwaddr):
        allowed = "six pairs of lower-case hexadecimal digits, a unicast address"
        raise InvalidRequest("invalid hardware address", field="spec.hwaddr", allowed=allowed)
    check_config(spec.config, "spec.config")


def check_route(route: Route) -> None:
    """Raise InvalidRequest when the way of a transfer is none that may be gone."""
    _check_transfer(route.transfer, "route.transfer")
    if not 0 <= route.round < MOST_ROUNDS:
        raise InvalidRequest("invalid round", field="route.round", allowed=f"0 to {MOST_ROUNDS - 1}")
    check_node_name(route.peer, "route.peer")
    check_public_key(route.peer_key, "route.peer_key")
    check_token(route.token, "route.token")
    if (route.address is None) is (route.relay is None):
        raise InvalidRequest("no way, or two", field="route", allowed="one of address and relay")
    if route.address is not None:
        _check_address(route.address)
    if route.relay is not None:
        check_path(route.relay, "route.relay")
        check_token(route.relay_put, "route.relay_put")
        check_token(route.relay_get, "route.relay_get")
    if route.rate == 0:
        raise InvalidRequest("nothing may be sent", field="route.rate", allowed="at least 1 byte per second")


def _check_address(address: str) -> None:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[2]) > 65535:
        raise InvalidRequest("invalid address", field="route.address", allowed="tcp://HOST:PORT")


def _check_transfer(transfer: str, field: str) -> None:
    if not TRANSFER.fullmatch(transfer):
        raise InvalidRequest("invalid name of a transfer", field=field, allowed=TRANSFER_RULE)


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise InvalidRequest("unknown format of a transfer", field="format", allowed=" or ".join(FORMATS))


def _check_image(arguments: EnsureImage) -> None:
    image = arguments.image
    check_fingerprint(image.fingerprint, "image.fingerprint")
    if image.layout not in LAYOUTS:
        raise InvalidRequest("unknown image layout", field="image.layout", allowed=" or ".join(LAYOUTS))
    if not 0 < image.size <= MAX_IMAGE:
        raise InvalidRequest("invalid image size", field="image.size", allowed=f"1 to {MAX_IMAGE}")
    if image.offset >= image.size or (image.offset > 0) is not (image.layout == "split"):
        raise InvalidRequest("invalid offset", field="image.offset", allowed="below the size, and 0 unless split")
    check_path(image.path, "image.path")
    check_token(image.token, "image.token")
