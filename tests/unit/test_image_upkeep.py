"""Images that go by themselves, and those that get newer versions, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from common.clock import timestamp
from common.errors import Unavailable
from common.states import Status
from controller.operations.containers import CreateParameters
from controller.records import Image, ImageOrigin, Operation
from controller.services.image_pulls import ImagePulls
from controller.services.image_sources import ImageSources
from controller.services.image_upkeep import ImageUpkeep
from controller.services.images import Images
from controller.services.remotes import Remotes
from controller.store import images as rows
from controller.store import operations as operation_rows
from tests.helpers.core import BUILT, CALLER, FINGERPRINT, Core, make_template, open_core

DAY = 86400.0
HOUR = 3600.0


class House:
    """The upkeep of a core's images; `newer` are those of which there is a newer version."""

    def __init__(self, core: Core, **settings: float) -> None:
        self.core = core
        self.asked: list[str] = []
        self.newer: set[str] = set()
        self.down = False
        self.writable = True
        self.remotes = SimpleNamespace(obtained_at={}, has_newer=self._has_newer, origin_of=lambda _image: None)
        found = SimpleNamespace(by_fingerprint=lambda fingerprint: core.fleet.images[fingerprint])
        remotes = cast(Remotes, self.remotes)
        self.upkeep = ImageUpkeep(
            core.fleet,
            remotes,
            ImagePulls(cast(Images, found), cast(ImageSources, None), remotes, core.operations),
            core.clock,
            lambda: self.writable,
            **{"cache_expiry": 10.0, "update_interval": 6.0, **settings},
        )

    async def _has_newer(self, image: Image) -> bool:
        self.asked.append(image.fingerprint[0])
        if self.down:
            raise Unavailable("out of reach")
        return image.fingerprint in self.newer

    async def have(self, mark: str, **fields: Any) -> str:
        """An image; its fingerprint."""
        image = msgspec.structs.replace(
            BUILT, fingerprint=mark * 64, source="", created_at=timestamp(self.core.clock.now()), **fields
        )
        await self.core.store.write(lambda transaction: rows.rows.insert(transaction, image))
        return image.fingerprint

    async def after(self, seconds: float) -> set[str]:
        """The images that are left when so much time has passed and all that was begun has ended."""
        self.core.clock.advance(seconds)
        await self.upkeep.look()
        for operation in await self.core.store.read(operation_rows.unfinished):
            if operation.kind.startswith("image."):
                await self.core.engine.wait(operation.id, 5)
        return {image[0] for image in self.core.fleet.images} - {FINGERPRINT[0]}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    core = await open_core(make_template(tmp_path), tmp_path / "core")
    yield House(core)
    await core.close()


async def test_a_cached_image_goes_ten_days_after_its_last_use(house: House) -> None:
    fingerprint = await house.have("1", cached=True)
    await house.have("2")
    await house.have("3", cached=True, aliases=("named",))
    assert await house.after(9.9 * DAY) == {"1", "2", "3"}
    used = timestamp(house.core.clock.now())
    await house.core.store.write(lambda transaction: rows.note_use(transaction, fingerprint, used))
    assert await house.after(9.9 * DAY) == {"1", "2", "3"}
    assert await house.after(0.2 * DAY) == {"2", "3"}


async def test_an_expiry_is_kept_for_every_image(house: House) -> None:
    soon, late = (timestamp(house.core.clock.now() + timedelta(days=days)) for days in (1, 30))
    await house.have("1", expires_at=soon, aliases=("named",))
    await house.have("2", expires_at=late, cached=True)
    assert await house.after(0.9 * DAY) == {"1", "2"}
    assert await house.after(0.2 * DAY) == {"2"}
    assert await house.after(20 * DAY) == {"2"}
    assert await house.after(10 * DAY) == set()


async def test_an_image_in_use_stays_until_nobody_needs_it(house: House) -> None:
    fingerprint = await house.have("1", cached=True)
    for field in ("parameters", "outputs"):
        spec = house.core.there.there["n1", "d"].spec
        wanted = CreateParameters(
            spec=spec, node="n1", fingerprint=fingerprint, source=None, properties={}, start=False
        )
        draft = house.core.operations.draft(CALLER, "container.create", containers=(), node="n1", parameters=wanted)
        if field == "outputs":
            parameters = {**draft.parameters, "fingerprint": None}
            outputs = {"image": {"fingerprint": fingerprint}}
            draft = msgspec.structs.replace(draft, parameters=parameters, outputs=outputs)
        await _write(house, draft)
        assert await house.after(11 * DAY) == {"1"}
        await _write(house, msgspec.structs.replace(draft, status=Status.SUCCESS), again=True)
    house.remotes.obtained_at[fingerprint] = house.core.clock.monotonic()
    assert await house.after(30) == {"1"}
    house.writable = False
    assert await house.after(DAY) == {"1"}
    house.writable = True
    assert await house.after(1) == set()


async def _write(house: House, operation: Operation, again: bool = False) -> None:
    write = operation_rows.rows.replace if again else operation_rows.add
    await house.core.store.write(lambda transaction: write(transaction, operation))


async def test_0_days_keep_cached_images_for_ever(house: House) -> None:
    forever = House(house.core, cache_expiry=0)
    await house.have("1", cached=True)
    assert await forever.after(1000 * DAY) == {"1"}


async def test_newer_versions_are_looked_for_every_six_hours(house: House) -> None:
    origin = ImageOrigin("simplestreams", "https://localhost", "tiny/1")
    fingerprint = await house.have("1", auto_update=True, origin=origin)
    await house.have("2", origin=origin)
    assert await house.after(5.9 * HOUR) == {"1", "2"} and house.asked == []
    assert await house.after(0.2 * HOUR) == {"1", "2"} and house.asked == ["1"]
    house.down = True
    assert await house.after(6.1 * HOUR) == {"1", "2"} and house.asked == ["1"] * 2
    house.down, house.newer = False, {fingerprint}
    assert "e" in await house.after(6.1 * HOUR)
    kinds = [change.record.kind for change in house.core.changes_seen if isinstance(change.record, Operation)]
    assert set(kinds) == {"image.refresh"}


async def test_0_hours_look_for_nothing(house: House) -> None:
    never = House(house.core, update_interval=0)
    await house.have("1", auto_update=True, origin=ImageOrigin("simplestreams", "https://localhost", "tiny/1"))
    await never.after(100 * DAY)
    assert never.asked == []
