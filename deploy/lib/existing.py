"""A bridge and a pool that the machine has already: looked at before anything is done."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.lib.console import DeployError, run
from deploy.lib.state import Settings, check_passable


def check(settings: Settings) -> None:
    """Raises DeployError with the reason when a node cannot use the bridge or the pool it was given."""
    for bridge in {node.bridge for node in settings.nodes if node.bridge}:
        check_bridge(bridge)
    for pool in {node.pool for node in settings.nodes if node.pool}:
        check_pool(Path(pool))


def check_bridge(name: str) -> None:
    """Refuse what is no bridge of this network namespace. Raises DeployError naming those that are."""
    bridges = [link["ifname"] for link in json.loads(run(["ip", "-json", "link", "show", "type", "bridge"]) or "[]")]
    if name not in bridges:
        known = f"it has {', '.join(bridges)}" if bridges else "it has none"
        raise DeployError(f"--bridge {name}: this machine has no bridge of that name; {known}")


def check_pool(path: Path) -> None:
    """Refuse what is no directory on btrfs, or one to which containers cannot get. Raises DeployError."""
    kind = file_system(path)
    if kind is None:
        raise DeployError(f"--pool {path}: there is no such directory")
    if kind != "btrfs":
        raise DeployError(f"--pool {path} is on {kind}: a directory on btrfs is expected. Is its file system mounted?")
    for directory in (*reversed(path.resolve().parents), path):
        check_passable(directory)


def file_system(directory: Path) -> str | None:
    """The kind of file system that a directory is on, such as `btrfs`; None where there is no such directory."""
    if not directory.is_dir():
        return None
    return run(["stat", "--file-system", "--format=%T", "--", str(directory)]).strip()
