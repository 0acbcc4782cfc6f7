"""Debian packages and lxcfs: what is there is left alone, what is missing is known."""

from pathlib import Path

import pytest

from deploy.lib import lxcfs, packages
from deploy.lib.console import DeployError

pytestmark = [pytest.mark.lxc, pytest.mark.serial]


def test_installed_and_missing_packages_are_told_apart() -> None:
    assert packages.missing(["coreutils", "vzfleet-no-such-package"]) == ["vzfleet-no-such-package"]


def test_a_complete_machine_needs_nothing() -> None:
    packages.install(packages.needed())
    assert packages.missing(packages.needed()) == []


def test_a_package_that_cannot_be_had_is_named() -> None:
    with pytest.raises(DeployError, match="vzfleet-no-such-package"):
        packages.install(["vzfleet-no-such-package"])


def test_lxcfs_serves_and_goes_only_when_it_was_started_here() -> None:
    if lxcfs.serves():  # the machine's own: it must stay
        lxcfs.up()
        assert lxcfs.serves()
        return
    lxcfs.up()
    lxcfs.up()
    assert lxcfs.serves()
    lxcfs.down()
    assert not lxcfs.serves()
    assert str(lxcfs.MOUNT_POINT) not in Path("/proc/self/mountinfo").read_text()
    assert not lxcfs.PID_FILE.exists()
