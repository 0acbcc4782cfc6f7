"""What this machine is to be: the settings of an earlier run, and what the command line adds."""

from __future__ import annotations

import ipaddress
import re
import socket
import zlib
from dataclasses import replace
from itertools import islice
from pathlib import Path

from deploy.lib import tokens
from deploy.lib.addresses import CONTAINER_POOL, FABRIC_POOL, free
from deploy.lib.arguments import DEFAULT_AGENT_PORT, DEFAULT_PORT, Options
from deploy.lib.console import DeployError
from deploy.lib.state import Node, Settings, State

# As common.names has it, which is not installed yet when this runs.
_NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NODE_NAME_RULE = "1-63 of a-z 0-9 -, beginning and ending with a letter or digit"


def decide(state: State, before: Settings | None, options: Options, used: list[ipaddress.IPv4Network]) -> Settings:
    """The settings to bring up. `used` are networks that must not be taken.

    Raises DeployError when the options contradict what was set up before.
    """
    if before is None:
        settings = Settings(port=options.port or DEFAULT_PORT, agent_port=options.agent_port or DEFAULT_AGENT_PORT)
        if settings.port == settings.agent_port:
            raise DeployError(f"--port and --agent-port must differ; both are {settings.port}")
    else:
        _check_same(before, options)
        settings = before
    return _with_nodes(state, settings, options, used)


def decide_agent(before: Settings | None, options: Options, used: list[ipaddress.IPv4Network]) -> Settings:
    """The settings of a machine with just an agent, which has the name that the join token gives, else the host's.

    What has joined before stays as it is.
    Raises DeployError when the token is none, the name cannot name a node, or the options contradict what was set up.
    """
    if before is not None:
        if before.port != 0:
            raise DeployError("this directory holds a controller: give --join another one by --state")
        _check_same_place(before, options)
        return before
    name = tokens.decode(options.join or "").get("node") or socket.gethostname().partition(".")[0].lower()
    if not _NODE_NAME.fullmatch(str(name)):
        raise DeployError(f"{name!r} cannot name a node: {NODE_NAME_RULE}")
    # Hosts of one fleet usually have the same state directory: their names tell them apart.
    subnet = None if options.bridge else next(free(CONTAINER_POOL, zlib.crc32(name.encode()), used), None)
    node = Node(name, 1, namespace=False, subnet=subnet, bridge=options.bridge, pool=_text(options.pool))
    return Settings(port=0, agent_port=0, nodes=(node,))


def _check_same(before: Settings, options: Options) -> None:
    if before.port == 0:
        raise DeployError(f"{options.state} holds just an agent: give another directory by --state")
    for name, old, new in (
        ("--port", before.port, options.port),
        ("--agent-port", before.agent_port, options.agent_port),
    ):
        if new not in (None, old):
            raise DeployError(
                f"{options.state} was set up with {name} {old}, which its agents know: --down --purge first"
            )
    _check_same_place(before, options)


def _check_same_place(before: Settings, options: Options) -> None:
    """Bridge and pool of a node stay what they were: its containers are there."""
    for node in before.nodes:
        for option, old, new in (("--bridge", node.bridge, options.bridge), ("--pool", node.pool, _text(options.pool))):
            if new not in (None, old):
                was = f"with {option} {old}" if old else f"without {option}"
                raise DeployError(f"{node.name} of {options.state} was set up {was}: --down --purge first")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _with_nodes(state: State, settings: Settings, options: Options, used: list[ipaddress.IPv4Network]) -> Settings:
    wanted = options.nodes or 1
    indices = range(len(settings.nodes) + 1, wanted + 1)
    start = int(state.tag, 16)
    subnets = list(islice(free(CONTAINER_POOL, start, used + _own(settings)), len(indices)))
    if len(subnets) < len(indices):
        raise DeployError(f"not enough of {CONTAINER_POOL} is free for {len(indices)} nodes")
    pool = _text(options.pool) or next((node.pool for node in settings.nodes), None)
    for index, subnet in zip(indices, subnets, strict=True):
        node = Node(f"node{index}", index, namespace=options.nodes is not None, subnet=subnet, pool=pool)
        settings = settings.with_nodes(replace(node, subnet=None, bridge=options.bridge) if options.bridge else node)
    if settings.fabric is None and any(node.namespace for node in settings.nodes):
        network = next(free(FABRIC_POOL, start, used), None)
        if network is None:
            raise DeployError(f"nothing of {FABRIC_POOL} is free for the network between the nodes")
        return settings.with_fabric(network)
    return settings


def _own(settings: Settings) -> list[ipaddress.IPv4Network]:
    return [ipaddress.IPv4Network(node.subnet) for node in settings.nodes if node.subnet]
