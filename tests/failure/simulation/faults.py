"""What goes wrong: a list of faults, each with its weight. Each begins, lasts a while, and is over at the latest when
everything is healed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.drivers.fake_state import Fault as DriverFault
from tests.failure.simulation.network import Weather

if TYPE_CHECKING:
    from tests.failure.simulation.world import World

DRIVER_COMMANDS = (
    "container.create",
    "container.start",
    "container.stop",
    "container.delete",
    "container.receive",
    "container.send",
    "container.copy",
    "container.update",
    "container.rename",
    "snapshot.create",
    "image.ensure",
)
End = Callable[[], None]


@dataclass(frozen=True)
class Fault:
    """A kind of fault: `begin` makes it happen and returns how it ends, `longest` is how many seconds it lasts."""

    name: str
    weight: float
    longest: float
    begin: Callable[[World, random.Random], End]


def _nothing() -> None:
    return


# ---------------------------------------------------------------- processes


def _kill_controller(world: World, _chance: random.Random) -> End:
    world.controller.kill()
    return world.controller.start


def _controller_dies_somewhere(world: World, chance: random.Random) -> End:
    world.controller.die_at = chance.randrange(1, 25)
    return world.controller.start


def _kill_agent(world: World, chance: random.Random) -> End:
    host = world.any_host(chance)
    host.kill()
    return host.start


def _agent_dies_somewhere(world: World, chance: random.Random) -> End:
    host = world.any_host(chance)
    host.die_at = chance.randrange(1, 12)
    return host.start


def _reboot(world: World, chance: random.Random) -> End:
    host = world.any_host(chance)
    world.invariants.disturbed(host.name)
    # It says no word more: until its silence is noticed, what is sent to it is lost.
    world.network.partition(host.name, frozenset({"up", "down"}))
    host.reboot()

    def end() -> None:
        world.network.sever_host(host.name)
        world.network.heal(host.name)
        host.start()

    return end


def _clock_jumps(world: World, chance: random.Random) -> End:
    clock = chance.choice([world.controller.clock, *(host.clock for host in world.hosts.values())])
    clock.skew += chance.choice((-86400.0, -3600.0, -5.0, 5.0, 3600.0, 86400.0))
    return _nothing


# ---------------------------------------------------------------- network


def _partition(world: World, chance: random.Random) -> End:
    host = world.any_host(chance)
    directions = chance.choice((frozenset({"up", "down"}), frozenset({"up"}), frozenset({"down"})))
    world.network.partition(host.name, directions)
    return lambda: world.network.heal(host.name)


def _partition_all(world: World, _chance: random.Random) -> End:
    for host in world.hosts:
        world.network.partition(host, frozenset({"up", "down"}))
    return lambda: [world.network.heal(host) for host in world.hosts] and None


def _sever(world: World, chance: random.Random) -> End:
    world.network.sever_host(world.any_host(chance).name)
    return _nothing


def _storm(world: World, chance: random.Random) -> End:
    world.network.weather = Weather(
        delay=(0.001, chance.choice((0.05, 0.5, 2.0))),
        late=chance.choice((0.0, 0.05, 0.2)),
        twice=chance.choice((0.0, 0.1, 0.5)),
        overtaken=chance.choice((0.0, 0.1, 0.5)),
        replayed=chance.choice((0.0, 0.05, 0.2)),
        broken=chance.choice((0.0, 0.01, 0.04)),
    )
    return lambda: setattr(world.network, "weather", Weather())


# ---------------------------------------------------------------- disks, drivers, containers


def _controller_disk_full(world: World, _chance: random.Random) -> End:
    world.controller.disk.full = True
    return lambda: setattr(world.controller.disk, "full", False)


def _agent_disk_full(world: World, chance: random.Random) -> End:
    disk = world.any_host(chance).journal
    disk.full = True
    return lambda: setattr(disk, "full", False)


def _driver_fails(world: World, chance: random.Random) -> End:
    faults = world.any_host(chance).node.script.faults
    fault = DriverFault(
        chance.choice(DRIVER_COMMANDS),
        code=chance.choice(("driver-failed", "no-space", "crash")),
        times=chance.choice((1, 1, 2)),
        when=chance.choice(("before", "after")),
    )
    faults.append(fault)
    return lambda: (fault in faults and faults.remove(fault)) or None


def _slow(world: World, chance: random.Random) -> End:
    host = world.any_host(chance)
    host.slowness = chance.choice((10.0, 40.0))
    return lambda: setattr(host, "slowness", 1.0)


def _container_dies(world: World, chance: random.Random) -> End:
    host = world.any_host(chance)
    running = sorted(id for id, container in host.node.world.containers.items() if container.running)
    if running:
        container = chance.choice(running)
        world.invariants.disturbed(host.name, container)
        if host.alive and host.driver is not None:
            host.driver.die(container)
        else:
            host.node.world.containers[container].stop()
    return _nothing


FAULTS: list[Fault] = [
    Fault("kill controller", 3, 8, _kill_controller),
    Fault("controller dies somewhere", 6, 15, _controller_dies_somewhere),
    Fault("kill agent", 3, 15, _kill_agent),
    Fault("agent dies somewhere", 8, 15, _agent_dies_somewhere),
    Fault("reboot", 2, 15, _reboot),
    Fault("clock jumps", 1, 0, _clock_jumps),
    Fault("partition", 6, 30, _partition),
    Fault("partition of all", 1, 12, _partition_all),
    Fault("connection breaks", 3, 0, _sever),
    Fault("storm", 4, 15, _storm),
    Fault("controller's disk full", 2, 6, _controller_disk_full),
    Fault("agent's disk full", 2, 6, _agent_disk_full),
    Fault("driver fails", 6, 20, _driver_fails),
    Fault("slow", 3, 15, _slow),
    Fault("container dies", 2, 0, _container_dies),
]


def choose(chance: random.Random) -> Fault:
    """One of the faults, by weight."""
    return chance.choices(FAULTS, [fault.weight for fault in FAULTS])[0]


@dataclass
class Running:
    """Faults that have begun and are not over."""

    ends: dict[int, End] = field(default_factory=dict)
    count: int = 0

    def begin(self, end: End) -> int:
        """Note how a fault ends; its number."""
        self.count += 1
        self.ends[self.count] = end
        return self.count

    def end(self, number: int) -> None:
        """It is over, if it is not already."""
        end = self.ends.pop(number, None)
        if end is not None:
            end()

    def end_all(self) -> None:
        """All are over."""
        for number in list(self.ends):
            self.end(number)
