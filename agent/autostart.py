"""Starting containers with their host: when the controller confirms their generation, or, without it, after a delay."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from agent.drivers.base import Driver
from agent.executor import Executor
from common.errors import InvalidRequest, NotFound, VzfleetError
from common.keys import write_private
from common.messages import StateChanged
from common.options import parse_config
from common.reports import ContainerReport
from common.states import Status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A container to be started with its host; a higher `priority` starts first."""

    id: str
    generation: int
    priority: int


def candidates(containers: Iterable[ContainerReport]) -> list[Candidate]:
    """The stopped containers that want to be started, in their order. An unmanaged one (generation 0) never is."""
    found = []
    for container in containers:
        if container.status != Status.STOPPED or container.generation == 0:
            continue
        try:
            settings = parse_config(container.config)
        except InvalidRequest as error:
            log.error(
                "a container's configuration cannot be read", extra={"container": container.id, "error": str(error)}
            )
            continue
        if settings.autostart:
            found.append(Candidate(container.id, container.generation, settings.autostart_priority))
    return sorted(found, key=lambda candidate: (-candidate.priority, candidate.id))


def due(
    waiting: Iterable[Candidate], confirmed: Mapping[str, int] | None, waited: float, delay: float | None
) -> list[Candidate]:
    """Which of them may start now, in their order.

    `confirmed` is the controller's word (None: it was not heard yet) and is the only one that counts once heard: what
    runs elsewhere must not start twice. Without it all may start after `delay` seconds, or never when that is None.
    """
    if confirmed is not None:
        return [candidate for candidate in waiting if confirmed.get(candidate.id) == candidate.generation]
    return list(waiting) if delay is not None and waited >= delay else []


class BootRecord:
    """The boot in which the agent's autostart was last done, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_new(self, boot_id: str) -> bool:
        """Whether the host has booted since."""
        return not self._path.exists() or self._path.read_text(encoding="utf-8").strip() != boot_id

    def done(self, boot_id: str) -> None:
        """Remember this boot."""
        write_private(self._path, boot_id + "\n")

    def forget(self) -> None:
        """Have the next run start the containers again: they were stopped by a shut-down."""
        self._path.unlink(missing_ok=True)


class Autostart:
    """Starts the containers of a freshly booted host."""

    def __init__(
        self,
        driver: Driver,
        executor: Executor,
        record: BootRecord,
        boot_id: str,
        send: Callable[[StateChanged], None],
        delay: float | None,
    ) -> None:
        self._driver = driver
        self._executor = executor
        self._record = record
        self._boot_id = boot_id
        self._send = send
        self._delay = delay
        self._confirmed: dict[str, int] | None = None
        self._heard = asyncio.Event()

    def confirm(self, generations: dict[str, int]) -> None:
        """The controller's word came."""
        self._confirmed = generations
        self._heard.set()

    async def run(self) -> None:
        """Start what is due, once in a boot; ends when that is done."""
        if not self._record.is_new(self._boot_id):
            return
        waiting = candidates(await self._driver.containers())
        if waiting:
            waited = await self._wait()
            ready = due(waiting, self._confirmed, waited, self._delay)
            held_back = [candidate.id for candidate in waiting if candidate not in ready]
            if held_back:
                log.warning("containers are not started: not confirmed", extra={"containers": held_back})
            await self._start_all(ready)
        self._record.done(self._boot_id)

    async def _wait(self) -> float:
        """Until the controller is heard (0), or the delay is over (its seconds)."""
        try:
            async with asyncio.timeout(self._delay):
                await self._heard.wait()
        except TimeoutError:
            log.warning("the controller is not heard: containers start without its word")
            return self._delay or 0.0
        return 0.0

    async def _start_all(self, ready: list[Candidate]) -> None:
        """Those of the same priority at once, the next when all of them are up."""
        for _, group in groupby(ready, key=lambda candidate: candidate.priority):
            await asyncio.gather(*(self._start(candidate) for candidate in group))

    async def _start(self, candidate: Candidate) -> None:
        async with self._executor.hold(candidate.id):
            try:
                report = await self._driver.inspect(candidate.id)
                if report.status != Status.STOPPED or report.generation != candidate.generation:
                    return
                await self._driver.start(candidate.id)
                log.info("started with the host", extra={"container": candidate.id})
                self._send(StateChanged(await self._driver.inspect(candidate.id)))
            except NotFound:
                log.info("a container is gone before its start", extra={"container": candidate.id})
            except VzfleetError as error:
                log.error("a container cannot be started", extra={"container": candidate.id, "error": error.text})
