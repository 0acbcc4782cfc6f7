"""Taking a machine down: stop what runs, and for a purge remove every trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from deploy.lib import existing, fabric, lxcfs, services, units
from deploy.lib.console import DeployError, run, say
from deploy.lib.state import Node, Settings, State
from deploy.lib.up import services_of

AGENT_TIMEOUT = 300.0


def stop(state: State, settings: Settings) -> None:
    """Stop services, containers, bridges, DHCP and mounts; the state stays."""
    supervisor = services.supervisor(state)
    for service in services_of(state, settings):
        if supervisor.running(service):
            say(f"stopping {service.name}")
        supervisor.stop(service)
    for node in settings.nodes:
        _agent(state, node, "down")
    _remove_network(state, settings)
    lxcfs.down()


def purge(state: State, settings: Settings) -> None:
    """After `stop`: remove what the agents keep, then the state directory. Raises DeployError when anything resists."""
    for node in settings.nodes:
        _agent(state, node, "purge")
        if node.pool and existing.file_system(Path(node.pool)) != "btrfs":
            say(f"{node.pool} is not mounted: what {node.name} kept in it stays in it")
    _unmount(state.root)
    for entry in state.entries():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    if any(state.root.iterdir()):
        raise DeployError(f"{state.root} stays: it holds files that are not this program's")
    state.root.rmdir()


def _agent(state: State, node: Node, command: str) -> None:
    """Run a command of the agent for a node that has joined, in the node's network."""
    directory = state.agent(node.name)
    if not (directory / "agent.json").exists() or not state.python.exists():
        return
    say(f"{node.name}: {'stopping containers' if command == 'down' else 'removing containers and pool'}")
    module = [str(state.python), "-m", "agent", command, "--state", str(directory)]
    run([*fabric.enter(state, node), *module], timeout=AGENT_TIMEOUT)


def _remove_network(state: State, settings: Settings) -> None:
    if units.systemd_runs():
        units.remove(units.name(state, "fabric"))
    fabric.down(state, settings)


def _unmount(root: Path) -> None:
    """Take off mounts below the directory and loop devices of files in it, which a broken run may have left."""
    points = json.loads(run(["findmnt", "--json", "--list", "--output", "TARGET"]))["filesystems"]
    for target in reversed([point["target"] for point in points]):
        if Path(target).is_relative_to(root):
            run(["umount", "--", target])
    devices = json.loads(run(["losetup", "--json", "--list", "--output", "NAME,BACK-FILE"]) or '{"loopdevices": []}')
    for device in devices["loopdevices"]:
        if Path(device["back-file"]).is_relative_to(root):
            run(["losetup", "--detach", device["name"]])
