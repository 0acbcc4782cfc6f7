"""A bridge and a pool that the host has: what is refused, and why."""

import json
from pathlib import Path

import pytest

from deploy.lib import existing
from deploy.lib.console import DeployError
from deploy.lib.state import Node, Settings


@pytest.mark.parametrize(("bridges", "told"), [([], "it has none"), (["br0", "br1"], "it has br0, br1")])
def test_what_is_no_bridge_is_refused(monkeypatch: pytest.MonkeyPatch, bridges: list[str], told: str) -> None:
    shown = json.dumps([{"ifname": name} for name in bridges])
    monkeypatch.setattr(existing, "run", lambda _arguments: shown)
    with pytest.raises(DeployError, match=f"--bridge eth0: .* no bridge of that name; {told}"):
        existing.check(Settings(1, 2, (Node("node1", 1, False, bridge="eth0"),)))
    for name in bridges:
        existing.check_bridge(name)


def test_a_pool_is_a_directory_on_btrfs_that_can_be_passed(
    passable_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        existing.check(Settings(1, 2, (Node("node1", 1, False, pool=str(passable_path / "pool")),)))

    with pytest.raises(DeployError, match="there is no such directory"):
        check()
    (passable_path / "pool").touch()
    with pytest.raises(DeployError, match="there is no such directory"):
        check()
    (passable_path / "pool").unlink()
    (passable_path / "pool").mkdir()
    monkeypatch.setattr(existing, "run", lambda _arguments: "ext2/ext3\n")
    with pytest.raises(DeployError, match=r"is on ext2/ext3: .* Is its file system mounted\?"):
        check()
    monkeypatch.setattr(existing, "run", lambda _arguments: "btrfs\n")
    check()
    (passable_path / "pool").chmod(0o700)
    with pytest.raises(DeployError, match="chmod o\\+x"):
        check()


def test_what_was_not_given_is_not_looked_at() -> None:
    existing.check(Settings(1, 2, (Node("node1", 1, False),)))
