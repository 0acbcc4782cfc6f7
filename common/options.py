"""The configuration keys of a container: one table from which validation, the metadata API and the docs come.

All values are strings (rule R27).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from common.errors import InvalidRequest
from common.names import has_control_characters
from common.snapshots import (
    DEFAULT_PATTERN,
    EXPIRY_RULE,
    PATTERN_RULE,
    SCHEDULE_RULE,
    check_expiry,
    check_pattern,
    expressions,
)
from common.units import SIZE_RULE, parse_percent, parse_size

_T = TypeVar("_T")
MIN_MEMORY = 1024 * 1024
MIN_DISK = 1024 * 1024
MAX_CPUS = 4096
MAX_VALUE_LENGTH = 4096
MAX_KEYS = 512
MAX_TOTAL_LENGTH = 65536
"""Characters of all keys and values together, so that a container's description always fits into a message."""
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_WHOLE = re.compile(r"[0-9]{1,10}")
_HARD_ALLOWANCE = re.compile(r"([0-9]{1,7})ms/([0-9]{1,7})ms")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_USER_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def parse_boolean(text: str, field: str) -> bool:
    """True or False of LXD's spellings. Raises InvalidRequest naming `field`."""
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise InvalidRequest(f"invalid boolean {text[:80]!r}", field=field, allowed="true or false") from None


def parse_whole(text: str, field: str, lowest: int, highest: int) -> int:
    """A whole number in a range. Raises InvalidRequest naming `field`."""
    if not _WHOLE.fullmatch(text) or not lowest <= int(text) <= highest:
        raise InvalidRequest(f"invalid number {text[:80]!r}", field=field, allowed=f"{lowest} to {highest}")
    return int(text)


@dataclass(frozen=True)
class Allowance:
    """CPU time: either a soft `share` (1-100 %) or a hard quota, `quota_us` of every `period_us` microseconds."""

    share: int | None = None
    quota_us: int | None = None
    period_us: int | None = None

    @property
    def cpus(self) -> float | None:
        """How many CPUs' worth of time the hard quota gives; None for a soft share."""
        if self.quota_us is None or self.period_us is None:
            return None
        return self.quota_us / self.period_us


def parse_allowance(text: str, field: str) -> Allowance:
    """`"50%"` is a soft share, `"25ms/100ms"` a hard quota. Raises InvalidRequest naming `field`."""
    share = parse_percent(text, field)
    if share is not None:
        return Allowance(share=share)
    match = _HARD_ALLOWANCE.fullmatch(text)
    rule = "1% to 100% (soft) or a quota such as 25ms/100ms (1-1000 ms periods, at least 1 ms of time)"
    if match is None:
        raise InvalidRequest(f"invalid CPU allowance {text[:80]!r}", field=field, allowed=rule)
    quota, period = int(match[1]), int(match[2])
    # The kernel takes periods of 1 ms to 1 s and quotas from 1 ms (Documentation/scheduler/sched-bwc.rst).
    if not (1 <= period <= 1000 and 1 <= quota <= period * MAX_CPUS):
        raise InvalidRequest(f"invalid CPU allowance {text!r}", field=field, allowed=rule)
    return Allowance(quota_us=quota * 1000, period_us=period * 1000)


def _check_memory(text: str, field: str) -> None:
    if parse_percent(text, field) is None and parse_size(text, field) < MIN_MEMORY:
        raise InvalidRequest(f"memory limit {text!r} is too small", field=field, allowed="at least 1MiB, or 1% to 100%")


def _check_disk(text: str, field: str) -> None:
    if parse_size(text, field) < MIN_DISK:
        raise InvalidRequest(f"disk limit {text!r} is too small", field=field, allowed="at least 1MiB")


def _check_text(text: str, field: str) -> None:
    if has_control_characters(text) or len(text) > MAX_VALUE_LENGTH:
        allowed = f"at most {MAX_VALUE_LENGTH} characters, none of them a control character"
        raise InvalidRequest("the value cannot stand in one line of configuration", field=field, allowed=allowed)


@dataclass(frozen=True)
class Option:
    """One configuration key. A key ending in `*` stands for all that begin so; `live` says that it applies at once."""

    key: str
    type: str
    default: str
    live: bool
    description: str
    allowed: str
    check: Callable[[str, str], object]


OPTIONS: tuple[Option, ...] = (
    Option(
        "limits.cpus", "integer", "", True,
        "Number of CPUs: the container is pinned to that many of the least loaded ones.",
        f"1 to {MAX_CPUS}", lambda text, field: parse_whole(text, field, 1, MAX_CPUS),
    ),
    Option(
        "limits.cpu", "integer", "", True, "The same as limits.cpus, spelled as LXD spells it.",
        f"1 to {MAX_CPUS}", lambda text, field: parse_whole(text, field, 1, MAX_CPUS),
    ),
    Option(
        "limits.cpu.allowance", "string", "", True,
        "CPU time: a soft share under contention, or a hard quota that always holds.",
        "1% to 100%, or time per period such as 25ms/100ms", parse_allowance,
    ),
    Option(
        "limits.memory", "size", "", True, "Memory, as a size or as a share of the node's.",
        f"1% to 100%, or {SIZE_RULE}, at least 1MiB", _check_memory,
    ),
    Option(
        "limits.disk", "size", "", True, "Size of the container's root file system (needs btrfs storage).",
        f"{SIZE_RULE}, at least 1MiB", _check_disk,
    ),
    Option(
        "limits.processes", "integer", "", True, "Number of processes and threads at once.",
        "1 to 4194304", lambda text, field: parse_whole(text, field, 1, 4194304),
    ),
    Option(
        "boot.autostart", "boolean", "false", True, "Start the container when its node starts.",
        "true or false", parse_boolean,
    ),
    Option(
        "boot.autostart.priority", "integer", "0", True, "Containers with a higher number start first.",
        "0 to 1000000", lambda text, field: parse_whole(text, field, 0, 1000000),
    ),
    Option(
        "snapshots.schedule", "string", "", True,
        "When snapshots are taken by themselves, in UTC; empty: never.", SCHEDULE_RULE, expressions,
    ),
    Option(
        "snapshots.schedule.stopped", "boolean", "false", True,
        "Take them also while the container is stopped.", "true or false", parse_boolean,
    ),
    Option(
        "snapshots.expiry", "string", "", True,
        "How long new snapshots are kept, unless they say otherwise; empty: for ever.", EXPIRY_RULE, check_expiry,
    ),
    Option(
        "snapshots.pattern", "string", DEFAULT_PATTERN, True,
        "What snapshots without a name are called; %d is the next number.", PATTERN_RULE, check_pattern,
    ),
    Option(
        "environment.*", "string", "", False, "A variable in the environment of the container's init.",
        "a name of A-Z a-z 0-9 _, and a value without control characters", _check_text,
    ),
    Option(
        "user.*", "string", "", True, "Free text for the user's own purposes; vzfleet does not read it.",
        "a name of A-Z a-z 0-9 . _ -, and a value without control characters", _check_text,
    ),
    Option(
        "security.privileged", "boolean", "false", False,
        "Run without an id map: root inside is root on the node. For trusted containers only.",
        "true or false", parse_boolean,
    ),
    Option(
        "security.nesting", "boolean", "false", False, "Allow containers inside the container.",
        "true or false", parse_boolean,
    ),
)  # fmt: skip
_BY_KEY = {option.key: option for option in OPTIONS}


def find_option(key: str) -> Option | None:
    """The table's row for a key such as `limits.memory` or `user.owner`; None when there is none."""
    if key in _BY_KEY:
        return None if key.endswith("*") else _BY_KEY[key]
    prefix, _, name = key.partition(".")
    pattern = {"environment": _ENVIRONMENT_NAME, "user": _USER_NAME}.get(prefix)
    return _BY_KEY[f"{prefix}.*"] if pattern is not None and pattern.fullmatch(name) else None


def check_config(config: Mapping[str, str], field: str = "config") -> None:
    """Refuse unknown keys and values out of range, naming `config.<key>` and what is allowed."""
    if len(config) > MAX_KEYS:
        raise InvalidRequest("too many configuration keys", field=field, allowed=f"at most {MAX_KEYS}")
    if sum(len(key) + len(value) for key, value in config.items()) > MAX_TOTAL_LENGTH:
        allowed = f"at most {MAX_TOTAL_LENGTH} characters of keys and values together"
        raise InvalidRequest("the configuration is too large", field=field, allowed=allowed)
    for key, value in config.items():
        path = f"{field}.{key[:160]}"
        option = find_option(key)
        if option is None:
            known = ", ".join(row.key for row in OPTIONS)
            raise InvalidRequest(f"unknown configuration key {key[:160]!r}", field=path, allowed=known)
        option.check(value, path)
    if config.get("limits.cpu", "") != config.get("limits.cpus", "") and {"limits.cpu", "limits.cpus"} <= config.keys():
        raise InvalidRequest(
            "limits.cpu and limits.cpus are the same key and differ", field=f"{field}.limits.cpu", allowed="one of them"
        )


@dataclass(frozen=True)
class Settings:
    """A checked configuration, parsed. None means: no limit."""

    cpus: int | None
    allowance: Allowance | None
    memory: int | None
    memory_share: int | None
    disk: int | None
    processes: int | None
    autostart: bool
    autostart_priority: int
    privileged: bool
    nesting: bool
    environment: dict[str, str]

    def memory_bytes(self, node_memory: int) -> int | None:
        """The memory limit in bytes on a node with `node_memory` bytes; None when there is no limit."""
        if self.memory_share is not None:
            return node_memory * self.memory_share // 100
        return self.memory


def parse_config(config: Mapping[str, str]) -> Settings:
    """Read a configuration which `check_config` has passed."""
    cpus = config.get("limits.cpus") or config.get("limits.cpu")
    memory = config.get("limits.memory")
    share = parse_percent(memory, "config.limits.memory") if memory else None
    return Settings(
        cpus=int(cpus) if cpus else None,
        allowance=_optional(config, "limits.cpu.allowance", parse_allowance),
        memory=parse_size(memory, "config.limits.memory") if memory and share is None else None,
        memory_share=share,
        disk=_optional(config, "limits.disk", parse_size),
        processes=int(config["limits.processes"]) if "limits.processes" in config else None,
        autostart=parse_boolean(config.get("boot.autostart", "false"), "config.boot.autostart"),
        autostart_priority=int(config.get("boot.autostart.priority", "0")),
        privileged=parse_boolean(config.get("security.privileged", "false"), "config.security.privileged"),
        nesting=parse_boolean(config.get("security.nesting", "false"), "config.security.nesting"),
        environment={key.partition(".")[2]: value for key, value in config.items() if key.startswith("environment.")},
    )


def _optional(config: Mapping[str, str], key: str, parse: Callable[[str, str], _T]) -> _T | None:
    return parse(config[key], f"config.{key}") if key in config else None
