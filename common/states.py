"""Status codes of LXD's REST API (rule R6) and which changes of state are legal.

A code of 200 and above is final. Names are spelled as LXD's code spells them.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Status(IntEnum):
    """Status codes of containers and operations."""

    CREATED = 100
    STARTED = 101
    STOPPED = 102
    RUNNING = 103
    CANCELLING = 104
    PENDING = 105
    STARTING = 106
    STOPPING = 107
    ABORTING = 108
    FREEZING = 109
    FROZEN = 110
    THAWED = 111
    ERROR = 112
    READY = 113
    SUCCESS = 200
    FAILURE = 400
    CANCELLED = 401

    @property
    def text(self) -> str:
        """The name in the API: `Running`, `Success`; 100 is `Operation created`."""
        return "Operation created" if self is Status.CREATED else self.name.capitalize()

    @property
    def final(self) -> bool:
        """An operation in this state never changes again."""
        return self >= 200


OPERATION_TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.RUNNING, Status.CANCELLING, Status.FAILURE, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.CANCELLING, Status.SUCCESS, Status.FAILURE}),
    Status.CANCELLING: frozenset({Status.CANCELLED, Status.SUCCESS, Status.FAILURE}),
    Status.SUCCESS: frozenset(),
    Status.FAILURE: frozenset(),
    Status.CANCELLED: frozenset(),
}


def may_follow(before: Status, after: Status) -> bool:
    """Whether an operation may go from one state to the other."""
    return after in OPERATION_TRANSITIONS[before]


class NodeStatus(StrEnum):
    """How the controller sees a node. Unreachable is never taken for dead."""

    ONLINE = "Online"
    SUSPECT = "Suspect"
    OFFLINE = "Offline"
    DRAINING = "Draining"
    REMOVED = "Removed"


CONTAINER_STATES = (
    Status.STOPPED,
    Status.RUNNING,
    Status.PENDING,
    Status.STARTING,
    Status.STOPPING,
    Status.FROZEN,
    Status.ERROR,
)


def status_named(name: str) -> Status | None:
    """The status with this API name, whatever its case; None if there is none."""
    return next((status for status in Status if status.text.lower() == name.lower()), None)
