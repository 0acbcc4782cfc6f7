"""Images that nobody needs go, images that are to stay up to date get their newer versions."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from common.clock import Clock
from common.errors import VzfleetError
from controller.fleet import Fleet
from controller.records import Image
from controller.services.caller import Caller
from controller.services.image_pulls import ImagePulls
from controller.services.remotes import Remotes

log = logging.getLogger(__name__)
LOOK_EVERY = 300.0
SPARED = 60.0
"""Seconds for which an image is spared after a creation has got it: that it did stands in no row yet."""


class ImageUpkeep:
    """Looks after the images. `cache_expiry` in days, `update_interval` in hours; 0 means never.

    `may_write` says whether the controller accepts changes now. `clock` should be one that is not set back.
    """

    def __init__(
        self,
        fleet: Fleet,
        remotes: Remotes,
        pulls: ImagePulls,
        clock: Clock,
        may_write: Callable[[], bool],
        *,
        cache_expiry: float,
        update_interval: float,
    ) -> None:
        self._fleet = fleet
        self._remotes = remotes
        self._pulls = pulls
        self._clock = clock
        self._may_write = may_write
        self._cache_expiry = timedelta(days=cache_expiry)
        self._interval = update_interval * 3600.0
        self._updated = clock.monotonic()

    async def run(self) -> None:
        """Look from time to time, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await self.look()

    async def look(self) -> None:
        """Look once: what has expired is deleted here and on the nodes, what has newer versions gets them."""
        if not self._may_write():
            return
        for image in list(self._fleet.images.values()):
            if self._has_expired(image):
                await self._try(image, self._pulls.expire(_caller(), image.fingerprint, self._has_expired))
        if self._interval and self._clock.monotonic() - self._updated >= self._interval:
            self._updated = self._clock.monotonic()
            for image in list(self._fleet.images.values()):
                if image.auto_update and image.origin is not None:
                    await self._try(image, self._update(image))

    async def _update(self, image: Image) -> None:
        if await self._remotes.has_newer(image):
            await self._pulls.refresh(_caller(), image.fingerprint)

    async def _try(self, image: Image, work: Awaitable[object]) -> None:
        try:
            await work
        except VzfleetError as error:
            log.info("an image stays as it is", extra={"image": image.fingerprint, "reason": error.text})

    def _has_expired(self, image: Image) -> bool:
        wanted = self._remotes.obtained_at.get(image.fingerprint)
        if wanted is not None and self._clock.monotonic() - wanted < SPARED:
            return False
        now = self._clock.now()
        if image.expires_at is not None:
            return datetime.fromisoformat(image.expires_at) <= now
        if not image.cached or not self._cache_expiry or image.aliases:
            return False
        return now - datetime.fromisoformat(image.last_used_at or image.created_at) >= self._cache_expiry


def _caller() -> Caller:
    """The controller itself."""
    return Caller("image upkeep", "admin", "internal", "", secrets.token_hex(8))
