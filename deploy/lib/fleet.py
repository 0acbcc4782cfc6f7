"""The controller and its agents: set up once, started when they do not run, waited for until they serve."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from functools import partial

from deploy.lib import addresses, fabric, processes, services, tokens
from deploy.lib.api import Api, ApiError
from deploy.lib.console import DeployError, run, say, wait_until
from deploy.lib.services import Service, Supervisor
from deploy.lib.state import Node, Settings, State, write

START_TIMEOUT = 180.0
ONLINE_TIMEOUT = 180.0
COMMAND_TIMEOUT = 120.0
POOL_SIZE = 20 * 10**9
SMALLEST_POOL = 10**9


def start_controller(state: State, settings: Settings, supervisor: Supervisor) -> Api:
    """Make database, keys and certificate on the first run, start the controller, and return a trusted caller."""
    service = services.controller(state, settings)
    if not supervisor.running(service):
        own = [address for address in (addresses.primary(), "127.0.0.1", "localhost") if address]
        init = [str(state.python), "-m", "controller", "init", "--state", str(state.controller), "--address", *own]
        run(init, timeout=COMMAND_TIMEOUT)
        say(f"starting the controller: REST on port {settings.port}, agents on port {settings.agent_port}")
    supervisor.start(service)
    _wait_for(supervisor, service, lambda: _answers(Api(settings.port, state.certificate)), START_TIMEOUT)
    return _trusted(state, settings)


def _trusted(state: State, settings: Settings) -> Api:
    """A caller with the token of the env file, or with a new one where that does not work any more."""
    token = read_env(state).get("VZFLEET_TOKEN", "")
    api = Api(settings.port, state.certificate, token)
    if not token or not _is_trusted(api):
        create = ["-m", "controller", "token", "--state", str(state.controller), "--name", "quickstart"]
        token = run([str(state.python), *create, "--role", "admin"], timeout=COMMAND_TIMEOUT).strip()
        api = Api(settings.port, state.certificate, token)
        if not _is_trusted(api):
            raise DeployError(f"the controller on port {settings.port} does not accept a token that it just gave")
    _write_env(state, settings, token)
    return api


def _write_env(state: State, settings: Settings, token: str) -> None:
    lines = {
        "VZFLEET_URL": f"https://127.0.0.1:{settings.port}",
        "VZFLEET_TOKEN": token,
        "VZFLEET_CACERT": str(state.certificate),
    }
    private = state.env_file.exists() and stat.S_IMODE(state.env_file.stat().st_mode) == 0o600
    if not private or read_env(state) != lines:
        write(state.env_file, "".join(f"{name}={value}\n" for name, value in lines.items()), 0o600)


def read_env(state: State) -> dict[str, str]:
    """The variables of the env file; empty where there is none."""
    if not state.env_file.exists():
        return {}
    return dict(line.split("=", 1) for line in state.env_file.read_text().splitlines() if "=" in line)


def start_agents(state: State, settings: Settings, supervisor: Supervisor, api: Api) -> None:
    """Join the nodes that have not joined, start the agents that do not run, wait until all are online."""
    for node in settings.nodes:
        if not joined(state, node):
            say(f"joining {node.name}")
            token = _at(_join_token(api, node), _address_for(settings, node), settings)
            join(state, node, token, len(settings.nodes))
    for node in settings.nodes:
        start_agent(state, node, supervisor)
    for node in settings.nodes:
        wait_for_process(state, node, supervisor)
    waiting = [node for node in settings.nodes if not _online(api, node)]
    if waiting:
        say(f"waiting for {', '.join(node.name for node in waiting)}")
    for node in waiting:
        _wait_for(supervisor, services.agent(state, node), partial(_online, api, node), ONLINE_TIMEOUT)


def start_agent(state: State, node: Node, supervisor: Supervisor) -> None:
    """Start the agent of one node, unless it runs."""
    service = services.agent(state, node)
    if not supervisor.running(service):
        say(f"starting the agent of {node.name}")
    supervisor.start(service)


def wait_for_process(state: State, node: Node, supervisor: Supervisor) -> None:
    """Wait until an agent runs; whether it is online only its controller can say, which may be elsewhere."""
    service = services.agent(state, node)
    up = partial(processes.running, service.pid_file, *service.words)
    _wait_for(supervisor, service, lambda: up() is not None, START_TIMEOUT)


def joined(state: State, node: Node) -> bool:
    """Whether the node's agent knows its controller."""
    return (state.agent(node.name) / "agent.json").exists()


def join(state: State, node: Node, token: str, nodes: int) -> None:
    """Enrol a node's agent by a one-time token; the machine has `nodes` of them, which share its disk."""
    options = [
        *("--node", node.name),
        *("--managed-bridge", f"vzbr-{state.tag}-{node.index}"),
        *("--cgroup", f"vzfleet-{state.tag}-{node.name}"),
        *("--pool-size", str(_pool_size(state, nodes))),
    ]
    given = {"--subnet": node.subnet, "--bridge": node.bridge, "--pool": node.pool}
    options += [word for option, value in given.items() if value for word in (option, value)]
    module = [str(state.python), "-m", "agent", "join", "--state", str(state.agent(node.name)), *options, "--", token]
    run([*fabric.enter(state, node), *module], timeout=COMMAND_TIMEOUT)


def _pool_size(state: State, nodes: int) -> int:
    """Bytes of a node's sparse pool file: less than usual where the disk could not hold what is promised."""
    share = shutil.disk_usage(state.root).free * 7 // 10 // nodes
    return max(SMALLEST_POOL, min(POOL_SIZE, share))


def _join_token(api: Api, node: Node) -> str:
    # A node that was made but never joined, in a run that broke off: its token is used up or lost.
    if api.find(f"/1.0/nodes/{node.name}") is not None:
        api.send("DELETE", f"/1.0/nodes/{node.name}")
    return str(api.send("POST", "/1.0/nodes", {"name": node.name})["token"])


def _address_for(settings: Settings, node: Node) -> str:
    """Where an agent of this machine reaches the controller; unlike the primary address it never changes."""
    return addresses.hosts(settings.fabric)[0] if node.namespace and settings.fabric else "127.0.0.1"


def _at(token: str, host: str, settings: Settings) -> str:
    """The join token with another address of the controller, which is known by its keys, wherever it is reached."""
    said = tokens.decode(token)
    said |= {"api": f"https://{host}:{settings.port}", "link": f"tcp://{host}:{settings.agent_port}"}
    return tokens.encode(said)


def _online(api: Api, node: Node) -> bool:
    found = api.find(f"/1.0/nodes/{node.name}")
    return found is not None and found["status"] in ("Online", "Draining")


def _answers(api: Api) -> bool:
    try:
        api.get("/1.0")
    except DeployError:
        return False
    return True


def _is_trusted(api: Api) -> bool:
    try:
        return bool(api.get("/1.0")["auth"] == "trusted")
    except ApiError:
        return False


def _wait_for(supervisor: Supervisor, service: Service, ready: Callable[[], bool], timeout: float) -> None:
    """Wait until a service is ready. Raises DeployError with its log when it ended, or at the time-out (seconds)."""
    if wait_until(lambda: ready() or not supervisor.running(service), timeout) and ready():
        return
    what = "is not ready" if supervisor.running(service) else "has ended"
    raise DeployError(f"{service.name} {what}; it wrote:\n{supervisor.log(service)}")
