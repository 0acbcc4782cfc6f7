"""The exception tree of the project. Each class has a stable `code` which crosses the wire and the REST API.

VzfleetError
├── InvalidRequest       the caller's input is wrong; names the field and what is allowed
├── Unauthorized         no or unknown credentials
├── Forbidden            known, but not allowed
├── NotFound             what was named does not exist
├── Conflict             exists already, does not fit, or is in the wrong state
│   ├── Busy             another operation works on it; carries that operation's URL
│   └── NoPlacement      no node fits; carries the reasons
├── PreconditionFailed   If-Match did not match
├── TooLarge             a body, header or message over its limit
├── TooMany              rate or connection limit
├── Unavailable          a node or a service is out of reach for now
│   └── Unreachable      the node at the other end cannot be reached directly
├── NoSpace              a disk is full
├── DeadlinePassed       it took too long
├── Cancelled            somebody asked for it to stop
├── Abandoned            an operator gave up on the node that should have done it
│   └── Fenced           an operator stated that the node's host is off
├── Stale                an older epoch, session or generation, or an expired command: never run
├── Unsupported          this driver or storage cannot do it; says why
├── DriverFailed         a tool of the host failed; carries what it printed
└── Internal             a fault of ours
"""

from __future__ import annotations

from typing import Any, ClassVar


class VzfleetError(Exception):
    """Base of all errors that may be shown to a caller.

    `field` is the path of the offending input (`config.limits.memory`), `allowed` says what it may be,
    `details` holds further facts of the class (for example `operation`).
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self,
        text: str,
        *,
        field: str | None = None,
        allowed: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(text)
        self.text = text
        self.field = field
        self.allowed = allowed
        self.details = details or {}


class InvalidRequest(VzfleetError):
    """The caller's input is wrong."""

    code = "invalid"


class Unauthorized(VzfleetError):
    """No or unknown credentials."""

    code = "unauthorized"


class Forbidden(VzfleetError):
    """The caller is known but may not do this."""

    code = "forbidden"


class NotFound(VzfleetError):
    """What was named does not exist."""

    code = "not-found"


class Conflict(VzfleetError):
    """It exists already, does not fit, or is in the wrong state."""

    code = "conflict"


class Busy(Conflict):
    """Another operation works on it; `details["operation"]` is that operation's URL."""

    code = "busy"


class NoPlacement(Conflict):
    """No node fits; `details["nodes"]` maps each node to the reason."""

    code = "no-placement"


class PreconditionFailed(VzfleetError):
    """The If-Match header names another revision."""

    code = "precondition-failed"


class TooLarge(VzfleetError):
    """A body, header or message is over its limit."""

    code = "too-large"


class TooMany(VzfleetError):
    """A rate or connection limit is reached."""

    code = "too-many"


class Unavailable(VzfleetError):
    """A node or a service is out of reach for now."""

    code = "unavailable"


class Unreachable(Unavailable):
    """The node at the other end of a transfer cannot be reached directly."""

    code = "unreachable"


class NoSpace(VzfleetError):
    """A disk is full."""

    code = "no-space"


class DeadlinePassed(VzfleetError):
    """It took longer than it may."""

    code = "deadline-passed"


class Cancelled(VzfleetError):
    """Somebody asked for it to stop."""

    code = "cancelled"


class Abandoned(VzfleetError):
    """An operator gave up on the node that should have done it; whether it did is not known."""

    code = "abandoned"


class Fenced(Abandoned):
    """An operator stated that the node's host is off: it is neither asked nor waited for."""

    code = "fenced"


class Stale(VzfleetError):
    """A command of an older epoch, session or generation, or an expired one: it is never run."""

    code = "stale"


class Unsupported(VzfleetError):
    """This driver or storage cannot do it."""

    code = "unsupported"


class DriverFailed(VzfleetError):
    """A tool of the host failed; the text says which and what it printed."""

    code = "driver-failed"


class Internal(VzfleetError):
    """A fault of ours."""

    code = "internal"


def _tree(root: type[VzfleetError]) -> dict[str, type[VzfleetError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_from_code(
    code: str,
    text: str,
    *,
    field: str | None = None,
    allowed: str | None = None,
    details: dict[str, Any] | None = None,
) -> VzfleetError:
    """Rebuild an error that crossed the wire; an unknown code becomes `Internal`."""
    known: dict[str, type[VzfleetError]] = {**_tree(VzfleetError), Internal.code: Internal}
    return known.get(code, Internal)(text, field=field, allowed=allowed, details=details)
