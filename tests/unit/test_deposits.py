"""Where nodes send the images that they make: one file for one operation, bounded, gone unless it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import Cancelled, Forbidden, TooLarge
from controller.images.deposits import Deposits
from controller.images.files import ImageFiles

ONE, OTHER = "one", "other"


@pytest.fixture
def deposits(tmp_path: Path) -> Deposits:
    return Deposits(ImageFiles(tmp_path), b"key", 10)


def incoming(directory: Path) -> list[Path]:
    return list((directory / "incoming").glob("*"))


async def sent(deposits: Deposits, content: bytes) -> str:
    staged = deposits.begin(ONE, deposits.token(ONE))
    await staged.write(content)
    return await deposits.finish(ONE, staged)


async def test_what_is_taken_stays_and_the_rest_goes(deposits: Deposits, tmp_path: Path) -> None:
    with deposits.expect(ONE) as place:
        assert place.take() is None
        await sent(deposits, b"first")
        fingerprint = await sent(deposits, b"again")
        deposits.begin(ONE, deposits.token(ONE))
        staged = place.take()
        assert staged is not None and staged.fingerprint == fingerprint and place.take() is None
    assert incoming(tmp_path) == [staged.path] and staged.path.read_bytes() == b"again"
    staged.discard()


async def test_nothing_comes_for_who_does_not_wait(deposits: Deposits, tmp_path: Path) -> None:
    with deposits.expect(ONE):
        for operation, token in ((ONE, deposits.token(OTHER)), (ONE, ""), (ONE, "é"), (OTHER, deposits.token(OTHER))):
            with pytest.raises(Forbidden):
                deposits.begin(operation, token)
        late = deposits.begin(ONE, deposits.token(ONE))
    with pytest.raises(Cancelled):
        await late.write(b"x")
    with pytest.raises(Forbidden):
        deposits.begin(ONE, deposits.token(ONE))
    assert incoming(tmp_path) == []


async def test_a_second_upload_takes_the_place_of_the_first(deposits: Deposits, tmp_path: Path) -> None:
    with deposits.expect(ONE) as place:
        first = deposits.begin(ONE, deposits.token(ONE))
        await first.write(b"half")
        await sent(deposits, b"whole")
        with pytest.raises(Cancelled):
            await deposits.finish(ONE, first)
        assert place.whole is not None and place.whole.size == 5
    assert incoming(tmp_path) == []


async def test_over_the_limit_nothing_stays(deposits: Deposits, tmp_path: Path) -> None:
    with deposits.expect(ONE):
        with pytest.raises(TooLarge):
            await sent(deposits, b"x" * 11)
        assert incoming(tmp_path) == []
