"""Bringing a machine up: each step does only what is not done yet."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

from deploy.lib import demo, fabric, fleet, hints, lxcfs, packages, services, units, virtualenv
from deploy.lib.console import DeployError, say
from deploy.lib.services import Service, Supervisor
from deploy.lib.state import Settings, State


def fleet_here(place: State, settings: Settings, with_demo: bool) -> str:
    """A controller, its agents and the first container on this machine; returns what to show."""
    supervisor = _prepare(place, settings, "controller")
    api = fleet.start_controller(place, settings, supervisor)
    fleet.start_agents(place, settings, supervisor, api)
    return hints.for_fleet(place, settings, demo.up(api) if with_demo else None)


def agent_here(place: State, settings: Settings, token: str | None) -> str:
    """Just an agent, joined to the controller of another machine by `token` on the first run."""
    supervisor = _prepare(place, settings, "")
    for node in settings.nodes:
        if not fleet.joined(place, node):
            if token is None:
                raise DeployError(f"{node.name} has not joined: give the token by --join TOKEN")
            say(f"joining the controller as {node.name}")
            fleet.join(place, node, token, len(settings.nodes))
        fleet.start_agent(place, node, supervisor)
        fleet.wait_for_process(place, node, supervisor)
    return hints.for_agent(place, settings)


def _prepare(place: State, settings: Settings, extra: str) -> Supervisor:
    """All that must be there before the first service starts."""
    packages.install(packages.PYTHON)
    supervisor = services.supervisor(place)
    current = virtualenv.is_current(place, extra)
    if not current:
        # Stopped first: a process must not find half of its modules replaced. Containers run on.
        for service in services_of(place, settings):
            supervisor.stop(service)
    with ThreadPoolExecutor(max_workers=1) as thread:
        python = None if current else thread.submit(virtualenv.install, place, extra)
        packages.install(packages.needed())
        if python is not None:
            python.result()
    lxcfs.up()
    _bring_up_fabric(place, settings)
    return supervisor


def services_of(place: State, settings: Settings) -> list[Service]:
    """The services of this machine, in the order in which they are to be stopped."""
    agents = [services.agent(place, node) for node in settings.nodes]
    return agents + ([services.controller(place, settings)] if settings.port else [])


def _bring_up_fabric(place: State, settings: Settings) -> None:
    fabric.up(place, settings)
    if settings.fabric and units.systemd_runs():
        # The unit does not depend on the checkout.
        shutil.copytree(virtualenv.CHECKOUT / "deploy", place.tool, dirs_exist_ok=True)
        command = [sys.executable, "-m", "deploy.lib.fabric", str(place.root)]
        unit = units.name(place, "fabric")
        units.install(unit, units.render("fabric.service", place, unit="fabric", command=command))
        units.enable(unit)
