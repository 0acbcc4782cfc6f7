"""How containers are run."""

from __future__ import annotations

from agent.config import AgentConfig
from agent.drivers.base import Driver
from common.clock import Clock


def create_driver(config: AgentConfig, clock: Clock) -> Driver:
    """The driver that the settings name; only that one is imported."""
    if config.driver == "fake":
        from agent.drivers.fake import FakeDriver

        return FakeDriver(config, clock)
    from agent.drivers.lxc.driver import LxcDriver

    return LxcDriver(config, clock)
