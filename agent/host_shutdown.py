"""When the host goes down its containers are asked to stop: killed with it, a database in one would have to recover."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from agent.drivers.base import Driver
from common.errors import DeadlinePassed, VzfleetError
from common.process import run
from common.states import Status

log = logging.getLogger(__name__)
SYSTEMD = Path("/run/systemd/system")
STOP_WITHIN = 60.0
"""Seconds for the containers' own ends; `TimeoutStopSec` of the agent's unit is longer."""
_ASK_WITHIN = 10.0


async def stop_containers(driver: Driver) -> None:
    """Stop what runs if systemd takes the host down just now; at any other end of the agent nothing is touched."""
    try:
        if await _host_goes_down():
            there = await driver.containers()
            up = [container for container in there if container.status in (Status.RUNNING, Status.FROZEN)]
            log.info("the host goes down: containers are stopped", extra={"containers": len(up)})
            await asyncio.gather(*(_stop(driver, container.id, container.status) for container in up))
    except VzfleetError as error:
        log.error("containers are not stopped with the host", extra={"reason": error.text})


async def _host_goes_down() -> bool:
    """What systemctl(1), is-system-running, says from the request to shut down or to reboot on."""
    if not SYSTEMD.is_dir():
        return False
    done = await run(["systemctl", "is-system-running"], timeout=_ASK_WITHIN, check=False)
    return done.output.strip() == "stopping"


async def _stop(driver: Driver, container: str, status: int) -> None:
    try:
        try:
            # A frozen one cannot answer.
            await driver.stop(container, STOP_WITHIN, status == Status.FROZEN)
        except DeadlinePassed:
            await driver.stop(container, 0, force=True)  # what is left would hold the shut-down up by as long again
    except VzfleetError as error:
        log.warning("a container does not stop with the host", extra={"container": container, "reason": error.text})
