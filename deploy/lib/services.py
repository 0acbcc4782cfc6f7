"""The controller and the agents as services: what each runs, and how it is started, watched and stopped.

With systemd each is a unit; without, a process of its own with a pid file and a log file.
"""

from __future__ import annotations

import shutil
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from deploy.lib import fabric, processes, units
from deploy.lib.console import DeployError, environment, run, succeeds, tail
from deploy.lib.state import Node, Settings, State

MAX_LOG = 10_000_000


@dataclass(frozen=True)
class Service:
    """One process that is to run. `words` are arguments by which it is known again. `template` is its unit's."""

    name: str
    arguments: list[str]
    words: tuple[str, ...]
    pid_file: Path
    template: str


def controller(state: State, settings: Settings) -> Service:
    """The controller of this state directory."""
    pid_file = state.run / "controller.pid"
    module = [str(state.python), "-m", "controller", "run", "--state", str(state.controller)]
    listen = ["--host", "0.0.0.0", "--port", str(settings.port), "--agent-port", str(settings.agent_port)]  # noqa: S104 (agents of other hosts connect)
    arguments = [*module, *listen, "--pid-file", str(pid_file)]
    return Service("controller", arguments, ("controller", str(state.controller)), pid_file, "controller.service")


def agent(state: State, node: Node) -> Service:
    """The agent of a node."""
    directory, pid_file = state.agent(node.name), state.run / f"agent-{node.name}.pid"
    module = [str(state.python), "-m", "agent", "run", "--state", str(directory), "--pid-file", str(pid_file)]
    arguments = fabric.enter(state, node) + module
    return Service(f"agent-{node.name}", arguments, ("agent", str(directory)), pid_file, "agent.service")


class Supervisor(ABC):
    """Starts and stops services."""

    def __init__(self, state: State) -> None:
        self._state = state

    @abstractmethod
    def running(self, service: Service) -> bool:
        """Whether it runs now."""

    @abstractmethod
    def start(self, service: Service) -> None:
        """Start it, or start it again when what it runs has changed; nothing when it runs as it should."""

    @abstractmethod
    def stop(self, service: Service) -> None:
        """Stop it and wait until it is gone; it does not come back with the host."""

    @abstractmethod
    def log(self, service: Service) -> str:
        """The last lines that it wrote."""


class OwnProcesses(Supervisor):
    """Without an init system: processes in sessions of their own; they do not come back after a reboot."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def running(self, service: Service) -> bool:
        child = self._children.get(service.name)
        if child is not None and child.poll() is None:
            return True
        return processes.running(service.pid_file, *service.words) is not None

    def start(self, service: Service) -> None:
        if self.running(service):
            return
        log = self._log_file(service)
        if log.exists() and log.stat().st_size > MAX_LOG:
            log.replace(log.with_suffix(".log.1"))
        self._children[service.name] = processes.spawn(program(service), log)

    def stop(self, service: Service) -> None:
        processes.end(service.pid_file, *service.words)
        child = self._children.pop(service.name, None)
        if child is not None:
            child.wait()

    def log(self, service: Service) -> str:
        log = self._log_file(service)
        return tail(log.read_text(errors="replace")) if log.exists() else ""

    def _log_file(self, service: Service) -> Path:
        return self._state.log / f"{service.name}.log"


class Systemd(Supervisor):
    """A unit for each service, enabled, logging to the journal."""

    def running(self, service: Service) -> bool:
        return succeeds(["systemctl", "is-active", "--quiet", self._unit(service)])

    def start(self, service: Service) -> None:
        text = units.render(service.template, self._state, unit=service.name, command=program(service))
        changed = units.install(self._unit(service), text)
        if changed or not self.running(service):
            run(["systemctl", "enable", self._unit(service)])
            run(["systemctl", "restart", self._unit(service)], timeout=120)

    def stop(self, service: Service) -> None:
        units.remove(self._unit(service))
        service.pid_file.unlink(missing_ok=True)

    def log(self, service: Service) -> str:
        lines = ["journalctl", "--unit", self._unit(service), "--no-pager", "--lines", "15", "--output", "cat"]
        return tail(run(lines, check=False))

    def _unit(self, service: Service) -> str:
        return units.name(self._state, service.name)


def supervisor(state: State) -> Supervisor:
    """The way in which this machine runs services."""
    return Systemd(state) if units.systemd_runs() else OwnProcesses(state)


def program(service: Service) -> list[str]:
    """The service's command with the program's whole path, which systemd wants."""
    found = shutil.which(service.arguments[0], path=environment()["PATH"])
    if found is None:
        raise DeployError(f"{service.arguments[0]} is not installed")
    return [found, *service.arguments[1:]]
