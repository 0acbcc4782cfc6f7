"""Figures of the node and its containers: all at every tick, and one at once when a command has changed it.

The driver reads files, which may take a while under load: always in this one thread, one call at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from agent.drivers.base import Driver
from common.clock import Clock
from common.messages import Samples
from common.reports import ContainerSample, NodeSample

_T = TypeVar("_T")
log = logging.getLogger(__name__)
PER_MESSAGE = 200
"""Containers in one message: some 100 kB, far below the codec's limit."""
SHORTEST_INTERVAL = 0.1
YOUNG_INTERVAL = 0.3
YOUNG = 15.0
"""Seconds for which a container that was just started is sampled more often, unless it has an address before."""


class Sampler:
    """Takes samples. `offer` gets the messages of each tick; `connected` tells whether anybody would read them."""

    def __init__(
        self,
        driver: Driver,
        clock: Clock,
        offer: Callable[[Sequence[Samples]], None],
        connected: asyncio.Event,
        interval: float,
    ) -> None:
        self._driver = driver
        self._clock = clock
        self._offer = offer
        self._connected = connected
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._changed = asyncio.Event()
        self._interval = max(SHORTEST_INTERVAL, interval)
        self._node: NodeSample | None = None
        self._young: dict[str, float] = {}
        self._started = asyncio.Event()

    @property
    def interval(self) -> float:
        """Seconds from one tick to the next."""
        return self._interval

    def set_interval(self, seconds: float) -> None:
        """Tick every so many seconds from now on, as the controller says."""
        self._interval = max(SHORTEST_INTERVAL, seconds)
        self._changed.set()

    async def run(self) -> None:
        """Tick until cancelled: at once on every connection, then at every interval. A failed tick is logged."""
        while True:
            await self._connected.wait()
            self._changed.clear()
            await self._tick()
            try:
                async with asyncio.timeout(self._interval):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def follow(self, container: str) -> None:
        """A container was started: somebody waits for its address, and should not have to wait for the next tick."""
        self._young[container] = self._clock.monotonic() + YOUNG
        self._started.set()

    async def follow_young(self) -> None:
        """Sample the containers that were just started, until they have an address. Until cancelled."""
        while True:
            await self._started.wait()
            await asyncio.sleep(YOUNG_INTERVAL)
            await self._tick_young()
            if not self._young:
                self._started.clear()

    async def _tick_young(self) -> None:
        names = list(self._young)
        samples = await self._read(lambda: self._driver.sample(names)) or []
        now = self._clock.monotonic()
        reached = {sample.id for sample in samples if has_address(sample)}
        self._young = {name: until for name, until in self._young.items() if name not in reached and until > now}
        if self._node is not None and samples:
            self._offer(batches(self._clock.now().timestamp(), self._node, samples))

    async def take(self, container: str) -> tuple[float, ContainerSample | None]:
        """One container's figures now: (seconds since 1970, sample or None when it is not there)."""
        found = await self._in_thread(lambda: self._driver.sample([container]))
        return self._clock.now().timestamp(), next((sample for sample in found if sample.id == container), None)

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _tick(self) -> None:
        read = await self._read(lambda: (self._driver.sample_node(), self._driver.sample()))
        if read is None:
            return
        self._node, containers = read
        self._offer(batches(self._clock.now().timestamp(), self._node, containers))

    async def _read(self, work: Callable[[], _T]) -> _T | None:
        """Run `work` in the thread; None when it fails, which is logged."""
        try:
            return await self._in_thread(work)
        # A fault in reading one figure must not end all samples for good.
        except Exception:
            log.exception("the samples could not be taken")
            return None

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def has_address(sample: ContainerSample) -> bool:
    """Whether a container can be reached from outside."""
    return any(address.scope == "global" for interface in sample.interfaces for address in interface.addresses)


def batches(sampled_at: float, node: NodeSample, containers: Sequence[ContainerSample]) -> list[Samples]:
    """One tick's figures as messages of bounded size; at least one, for the node."""
    starts = range(0, max(1, len(containers)), PER_MESSAGE)
    return [Samples(sampled_at, node, tuple(containers[start : start + PER_MESSAGE])) for start in starts]
