"""The bookkeeping below the fake driver: the world, the script of delays and faults, the count of effects."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from agent.context import current_command
from agent.drivers.fake_state import (
    Effect,
    FakeContainer,
    FakeSnapshot,
    FakeWorld,
    Script,
    ScriptFile,
    load_world,
    save_world,
    temporary_of,
)
from common.errors import Conflict, NotFound
from common.reports import ContainerSpec
from common.states import Status


class FakeNode:
    """A node that is only written down, in memory and (when `persist`) in `world.json` of its directory."""

    def __init__(self, directory: Path, persist: bool) -> None:
        self.script = Script()
        self.effects_file = directory / "effects"
        self._directory = directory
        self._persist = persist
        self._world_file = directory / "world.json"
        self._script_file = ScriptFile(directory / "script.json")
        self.world = load_world(self._world_file) if persist else FakeWorld()

    def open(self, boot_id: str) -> None:
        """Make the directory; on another boot than before, everything is stopped."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.refresh_script()
        temporary_of(self._world_file).unlink(missing_ok=True)
        last = self.world.last
        if last is not None and self._counted() == last.offset:
            # Killed between the effect and its count.
            self._count(last.line)
        if self.world.boot_id != boot_id:
            self.world.boot_id = boot_id
            self.stop_all()

    def refresh_script(self) -> None:
        """Read the script again if it was written."""
        self.script = self._script_file.newer() or self.script

    def stop_all(self) -> None:
        """Nothing runs any more."""
        for container in self.world.containers.values():
            container.stop()
        self.save()

    def remove(self) -> None:
        """Leave nothing."""
        self.world = FakeWorld(boot_id=self.world.boot_id)
        for name in ("world.json", "script.json", "effects"):
            (self._directory / name).unlink(missing_ok=True)
        if self._directory.exists():
            self._directory.rmdir()

    def find(self, container: str) -> FakeContainer:
        """A container. Raises NotFound."""
        found = self.world.containers.get(container)
        if found is None:
            raise NotFound(f"container {container} is not on the node")
        return found

    def content(self, container: str, snapshot: str | None) -> str:
        """The content of a container or of its snapshot. Raises NotFound."""
        found = self.find(container)
        if snapshot is None:
            return found.content
        taken = found.snapshot(snapshot)
        if taken is None:
            raise NotFound(f"container {container} has no snapshot {snapshot}")
        return taken.content

    def present(self, spec: ContainerSpec) -> bool:
        """Whether this very container exists. Raises Conflict when it does with another generation."""
        there = self.world.containers.get(spec.id)
        if there is not None and there.spec.generation != spec.generation:
            raise Conflict(f"container {spec.id} exists with generation {there.spec.generation}")
        return there is not None

    def add(self, command: str, spec: ContainerSpec, content: str, snapshots: list[FakeSnapshot]) -> None:
        """A new, stopped container."""
        self.world.containers[spec.id] = FakeContainer(spec, Status.STOPPED, content, snapshots=list(snapshots))
        self.done(command, spec.id)

    async def reach(self, command: str, target: str) -> None:
        """Before an effect: the script's delay and fault. What follows until `done` is not interrupted."""
        self.refresh_script()
        await asyncio.sleep(self.script.delay(command))
        fault = self.script.take_fault(command, target, "before")
        if fault is not None:
            raise fault

    def done(self, command: str, target: str) -> None:
        """After an effect: keep the world, count the effect, and then fail if the script says so."""
        line = f"{command} {target} {current_command.get() or '-'}\n"
        self.world.last = Effect(self._counted(), line)
        self.save()
        self._count(line)
        fault = self.script.take_fault(command, target, "after")
        if fault is not None:
            raise fault

    def _counted(self) -> int:
        return self.effects_file.stat().st_size if self.effects_file.exists() else 0

    def _count(self, line: str) -> None:
        descriptor = os.open(self.effects_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def save(self) -> None:
        """Keep the world as it is now."""
        if self._persist and self._directory.exists():
            save_world(self._world_file, self.world)
