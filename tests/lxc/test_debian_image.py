"""The Debian image, really built from the archive and started as an unprivileged container."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from common import process
from controller.images.builders import DebianBuilder
from controller.images.files import ImageFiles
from controller.images.inspect import inspect
from tests.helpers.image_machine import image_machine, until

# Alone: the build's mount namespace keeps the loop devices of other tests' pools.
pytestmark = [pytest.mark.lxc, pytest.mark.serial, pytest.mark.timeout(1800)]


async def test_debian_is_built_boots_and_stops(tmp_path: Path) -> None:
    files = ImageFiles(tmp_path)
    stages: list[int] = []
    built = await DebianBuilder().build(
        {"os": "debian", "release": "12"}, files, lambda _, percent: stages.append(percent or 0)
    )
    image = await files.keep(built.staged)
    assert stages == sorted(stages) and stages[-1] == 100 and len(stages) >= 6
    assert (await inspect(image)).layout == "rootfs"
    listing = await process.run(["tar", "--list", "--verbose", f"--file={image}"], timeout=120)
    assert not [line for line in listing.output.splitlines() if line[:1] in "bc"], "a mapped root makes no devices"
    async with image_machine() as machine:
        await machine.unpack(image)
        root = machine.state / "c/rootfs"
        assert (root / "dev").is_dir() and not list((root / "dev").iterdir())
        assert not (root / "etc/hostname").exists() and (root / "etc/machine-id").read_bytes() == b""
        await machine.start("SIGRTMIN+3")
        await until(machine.has_address, timeout=60)
        state = await machine.attach("systemctl", "is-system-running", "--wait", timeout=120, check=False)
        failed = (await machine.attach("systemctl", "--failed", "--no-legend", check=False)).output
        assert state.output.strip() == "running", failed
        assert (await machine.attach("hostname")).output.strip() == "image-test"
        answer = await machine.attach("getent", "hosts", "image-test.containers.test")
        assert answer.code == 0, "names are asked at the node's DNS"
        begun = time.monotonic()
        await machine.lxc("stop", "--nokill", "-t", "60", timeout=90)
        assert await machine.state_name() == "STOPPED"
        assert time.monotonic() - begun < 30
    assert not list((tmp_path / "incoming").iterdir())
