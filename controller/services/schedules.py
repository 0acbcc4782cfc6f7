"""Snapshots that are taken and deleted by themselves: by snapshots.schedule, and when they have expired.

Once a minute by the controller's clock. A moment is never tried twice: the operation that takes a snapshot has an id
that only its moment and its container have. What cannot be done at its moment is left out, and told.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from common.clock import Clock, timestamp
from common.errors import Conflict, InvalidRequest, VzfleetError
from common.options import parse_boolean
from common.states import Status
from common.tasks import Tasks
from controller import cron
from controller.events import Events
from controller.live import LiveContainer
from controller.records import Operation, Phase
from controller.services.caller import Caller
from controller.services.containers import Containers
from controller.services.snapshots import DONE, Snapshots
from controller.services.turns import Turns

log = logging.getLogger(__name__)
STOPPED_TOO = "snapshots.schedule.stopped"
LATE = timedelta(minutes=10)
"""What fell due while the controller did not run is still taken so much later."""
GATHERING = 20.0
"""Seconds after the start in which nodes that do not answer yet may only be on their way back."""
RETRY = timedelta(hours=1)
"""How long after a deletion that failed the next one is tried."""
ON_A_NODE = 4
TOGETHER = 64
LOOK = 1.0
"""Seconds between two looks at the clock."""
AT_ONCE = 200
"""Containers that are looked at before others have their turn on the event loop."""
_MINUTE = timedelta(minutes=1)


class Schedules:
    """Takes and deletes snapshots in the background, `TOGETHER` containers at once, `ON_A_NODE` of one node."""

    def __init__(
        self,
        containers: Containers,
        snapshots: Snapshots,
        events: Events,
        clock: Clock,
        writable: Callable[[], bool],
    ) -> None:
        """`writable`: whether the controller accepts writes now."""
        self._containers = containers
        self._snapshots = snapshots
        self._events = events
        self._clock = clock
        self._writable = writable
        self._tasks = Tasks("schedules")
        self._turns = Turns(self._work, self._tasks, together=TOGETHER, on_a_node=ON_A_NODE)
        self._seen = clock.now() - LATE
        """Up to here all moments are dealt with."""
        self._due: dict[str, datetime] = {}
        self._retry: dict[tuple[str, str], datetime] = {}
        """When a deletion that failed is tried again, by container and snapshot."""

    def start(self) -> None:
        """Begin to look at the clock."""
        self._tasks.start(self._run(), "clock")

    async def close(self) -> None:
        """Leave what is under way to the operations, which go on after the next start."""
        self._turns.close()
        await self._tasks.close()

    @property
    def busy(self) -> int:
        """How many containers wait for their turn, or are worked on."""
        return len(self._turns)

    async def _run(self) -> None:
        await self._containers.nodes.all_reachable(GATHERING)
        while True:
            if abs(self._clock.now() - self._seen) >= _MINUTE:
                await self.look()
            await asyncio.sleep(LOOK)

    # ------------------------------------------------------------ what is due

    async def look(self) -> None:
        """Have all done that is due by now."""
        now = self._clock.now()
        after, until = max(self._seen, now - LATE), now.replace(second=0, microsecond=0)
        self._seen = until
        if not self._writable():
            return
        moments: dict[str, datetime | None] = {}
        left_out: Counter[str] = Counter()
        for position, live in enumerate(list(self._containers.fleet.containers.values())):
            if position % AT_ONCE == 0:
                await asyncio.sleep(0)
            if live.record.phase is Phase.READY:
                self._look_at(live, after, until, moments, left_out)
        self._retry = {key: at for key, at in self._retry.items() if at > now}
        if left_out:
            log.info("stopped containers are left out of their schedules", extra={"containers": left_out.total()})

    def _look_at(
        self,
        live: LiveContainer,
        after: datetime,
        until: datetime,
        moments: dict[str, datetime | None],
        left_out: Counter[str],
    ) -> None:
        """`moments` holds the last moment of each schedule that was looked at."""
        container, schedule = live.record.id, live.record.config.get(cron.KEY, "")
        due = False
        if schedule:
            if schedule not in moments:
                moments[schedule] = _last_moment(schedule, after, until)
            moment = moments[schedule]
            if moment is not None and datetime.fromisoformat(live.record.created_at) < moment:
                if self._is_wanted(live):
                    self._due[container] = moment
                    due = True
                else:
                    left_out[live.record.node] += 1
        if due or self._expired(live, timestamp(self._clock.now())):
            self._turns.put(container, live.record.node)

    def _is_wanted(self, live: LiveContainer) -> bool:
        """Whether its state is one in which it is taken: of one out of reach the last known one counts."""
        shown = self._containers.fleet.status_of(live)
        status = shown.last if shown.status is Status.ERROR else shown.status
        return status is not Status.STOPPED or parse_boolean(
            live.record.config.get(STOPPED_TOO, "false"), f"config.{STOPPED_TOO}"
        )

    def _expired(self, live: LiveContainer, now: str) -> list[str]:
        """Its snapshots that are to be deleted now, the oldest first; none while that cannot be."""
        if not live.snapshots:
            return []
        found = [
            snapshot
            for snapshot in live.snapshots.values()
            if snapshot.expires_at is not None
            and snapshot.expires_at <= now
            and (live.record.id, snapshot.name) not in self._retry
        ]
        node = self._containers.fleet.nodes.get(live.record.node)
        if not found or live.record.operation is not None or node is None or not node.reachable:
            return []
        return [snapshot.name for snapshot in sorted(found, key=lambda one: (one.created_at, one.name))]

    # ------------------------------------------------------------ doing it

    async def _work(self, container: str) -> None:
        """One container's turn: take what is due, then delete what has expired."""
        moment = self._due.pop(container, None)
        if moment is not None:
            await self._take(container, moment)
        live = self._containers.fleet.containers.get(container)
        for name in self._expired(live, timestamp(self._clock.now())) if live is not None else []:
            await self._delete(container, name)

    async def _take(self, container: str, moment: datetime) -> None:
        if container not in self._containers.fleet.containers:
            return
        try:
            accepted = await self._snapshots.take_scheduled(_caller(moment), container, moment)
        except VzfleetError as error:
            if not (isinstance(error, Conflict) and error.field == DONE):
                self._tell("container-snapshot-skipped", container, moment, error.text)
            return
        ended = await self._containers.operations.wait(accepted.id, None)
        if ended.status is not Status.SUCCESS:
            self._tell("container-snapshot-failed", container, moment, _why(ended), accepted)

    async def _delete(self, container: str, name: str) -> None:
        now = self._clock.now()
        try:
            accepted = await self._snapshots.delete(_caller(now.replace(second=0, microsecond=0)), container, name)
            ended = await self._containers.operations.wait(accepted.id, None)
        except VzfleetError:
            return  # it is looked at again in a minute
        if ended.status is not Status.SUCCESS:
            self._retry[container, name] = now + RETRY
            self._tell("container-snapshot-failed", container, now, _why(ended), accepted)

    def _tell(
        self, action: str, container: str, moment: datetime, reason: str, operation: Operation | None = None
    ) -> None:
        """One event and one line; nothing is tried again before the next moment."""
        live = self._containers.fleet.containers.get(container)
        node = live.record.node if live is not None else None
        details = {"moment": timestamp(moment), "reason": reason}
        if operation is not None:
            details["operation"] = f"/1.0/operations/{operation.id}"
        self._events.note(action, f"/1.0/vz/{container}", container=container, node=node, details=details)
        log.warning(action, extra={"container": container, **details})


def _last_moment(schedule: str, after: datetime, until: datetime) -> datetime | None:
    try:
        return cron.last_moment(schedule, after, until)
    except InvalidRequest as error:  # written by an older version, or by hand
        log.error("a schedule cannot be read", extra={"schedule": schedule, "reason": error.text})
        return None


def _caller(moment: datetime) -> Caller:
    return Caller("schedule", "admin", "internal", "", f"schedule-{moment.astimezone(UTC):%Y%m%dT%H%MZ}")


def _why(ended: Operation) -> str:
    return ended.error.text if ended.error is not None else ended.status.text
