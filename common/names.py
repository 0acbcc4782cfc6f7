"""Names that become parts of paths, commands and LXC's configuration: checked on both sides."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from common.errors import InvalidRequest

CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CONTAINER_ID_RULE = "1-64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
SNAPSHOT_NAME_RULE = CONTAINER_ID_RULE
NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NODE_NAME_RULE = "1-63 of a-z 0-9 -, beginning and ending with a letter or digit"
HOSTNAME_RULE = "1-64 printable ASCII characters, no white space, slash, colon or comma"
ALIAS_RULE = "1-128 printable ASCII characters without white space, not beginning with '-' or '/'"
TRANSFER = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
TRANSFER_RULE = "1-64 of A-Z a-z 0-9 -, beginning with a letter or digit"
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_HOSTNAME = re.compile(r"[!-~]{1,64}")
_ALIAS = re.compile(r"[!-,.0-~][!-~]{0,127}")
_DNS_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def check_container_id(value: str, field: str = "id") -> str:
    """Return `value` if it may name a container, else raise InvalidRequest."""
    if not CONTAINER_ID.fullmatch(value):
        raise InvalidRequest(f"invalid container id {value[:80]!r}", field=field, allowed=CONTAINER_ID_RULE)
    return value


def check_snapshot_name(value: str, field: str = "name") -> str:
    """Return `value` if it may name a snapshot, else raise InvalidRequest."""
    if not CONTAINER_ID.fullmatch(value):
        raise InvalidRequest(f"invalid snapshot name {value[:80]!r}", field=field, allowed=SNAPSHOT_NAME_RULE)
    return value


def check_node_name(value: str, field: str = "node") -> str:
    """Return `value` if it may name a node, else raise InvalidRequest."""
    if not NODE_NAME.fullmatch(value):
        raise InvalidRequest(f"invalid node name {value[:80]!r}", field=field, allowed=NODE_NAME_RULE)
    return value


def check_hostname(value: str, field: str = "hostname") -> str:
    """Return `value` if the API document allows it as a hostname, less control characters and white space."""
    if not _HOSTNAME.fullmatch(value) or any(mark in value for mark in "/:,"):
        raise InvalidRequest(f"invalid hostname {value[:80]!r}", field=field, allowed=HOSTNAME_RULE)
    return value


def check_alias(value: str, field: str = "alias") -> str:
    """Return `value` if it may name an image, else raise InvalidRequest."""
    if not _ALIAS.fullmatch(value):
        raise InvalidRequest(f"invalid image alias {value[:80]!r}", field=field, allowed=ALIAS_RULE)
    return value


def check_fingerprint(value: str, field: str = "fingerprint") -> str:
    """Return `value` if it is a whole sha256 in lower-case hexadecimal, else raise InvalidRequest."""
    if not FINGERPRINT.fullmatch(value):
        raise InvalidRequest(f"invalid fingerprint {value[:80]!r}", field=field, allowed="64 hexadecimal digits")
    return value


def has_control_characters(value: str) -> bool:
    """Whether any character could end or hide a line: C0, C1, DEL, and Unicode's line and format marks."""
    return any(unicodedata.category(mark) in ("Cc", "Cf", "Zl", "Zp", "Cs") for mark in value)


def dns_label(hostname: str) -> str:
    """The name under which a container stands in DNS: its hostname if RFC 1123 allows it, else `ct-<hash>`."""
    if _DNS_LABEL.fullmatch(hostname):
        return hostname.lower()
    return "ct-" + hashlib.sha256(hostname.encode()).hexdigest()[:12]
