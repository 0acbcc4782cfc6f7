"""What the fake driver keeps, and the script which tells it how slow and how faulty to be."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from common.errors import InvalidRequest, error_from_code
from common.reports import ContainerReport, ContainerSpec, Difference, ImageReport, SnapshotReport
from common.states import Status


class FakeSnapshot(Struct):
    """A snapshot: its name, when it was taken (seconds since 1970) and the container's content then."""

    name: str
    created_at: float
    content: str


class FakeContainer(Struct):
    """A container that is only written down. `content` stands for its files, `altered` for what was changed by hand.

    `before` is what it was before its adoption, until that is settled.
    """

    spec: ContainerSpec
    status: int
    content: str
    started_at: float | None = None
    snapshots: list[FakeSnapshot] = []
    altered: dict[str, str | None] = {}
    before: ContainerSpec | None = None

    @property
    def running(self) -> bool:
        """Whether it has processes, frozen ones included."""
        return self.status in (Status.RUNNING, Status.FROZEN)

    def stop(self) -> None:
        """It has no processes any more."""
        self.status, self.started_at = Status.STOPPED, None

    def report(self) -> ContainerReport:
        """It as the wire shows it."""
        snapshots = tuple(SnapshotReport(snapshot.name, snapshot.created_at) for snapshot in self.snapshots)
        spec = self.spec
        altered = tuple(Difference(key, spec.config.get(key), found) for key, found in self.altered.items())
        return ContainerReport(
            spec.id,
            spec.generation,
            self.status,
            spec.config,
            spec.hostname,
            snapshots=snapshots,
            hwaddr=spec.hwaddr,
            altered=altered,
        )

    def snapshot(self, name: str) -> FakeSnapshot | None:
        """The snapshot of this name."""
        return next((snapshot for snapshot in self.snapshots if snapshot.name == name), None)


class FakeImage(Struct):
    """An image that is "unpacked" for the kinds `mapped` and `privileged`."""

    size: int
    kinds: list[str]


class Effect(Struct):
    """An effect: its line in the file that counts them, and the bytes that stood there before it."""

    offset: int
    line: str


class FakeWorld(Struct):
    """All that exists on a fake node; `last` is the effect by which it became so.

    `transfers`: the transfers that keep something here, and their latest round.
    """

    boot_id: str = ""
    containers: dict[str, FakeContainer] = {}
    images: dict[str, FakeImage] = {}
    transfers: dict[str, int] = {}
    last: Effect | None = None

    def image_reports(self) -> list[ImageReport]:
        """The images as the wire shows them."""
        return [ImageReport(name, image.size, "mapped" in image.kinds) for name, image in self.images.items()]


def load_world(path: Path) -> FakeWorld:
    """Read what an earlier run left; an empty world when there is nothing."""
    return msgspec.json.decode(path.read_bytes(), type=FakeWorld) if path.exists() else FakeWorld()


def temporary_of(path: Path) -> Path:
    """Where a world is written before it takes its place."""
    return path.with_name(f".{path.name}.new")


def save_world(path: Path, world: FakeWorld) -> None:
    """Write it in one step: a killed agent leaves the old or the new world, never half of one."""
    temporary = temporary_of(path)
    temporary.write_bytes(msgspec.json.encode(world))
    temporary.replace(path)


class Fault(Struct):
    """An error to be raised `times` times for a command, of one container or (None) of any.

    `when` is `before` the effect, or `after` it: then it has happened, and the caller hears that it failed.
    `code` is one of `common.errors`; `crash` raises an error that is none of the project's.
    """

    command: str
    container: str | None = None
    code: str = "driver-failed"
    text: str = "a scripted fault"
    times: int = 1
    when: str = "before"

    def error(self) -> Exception:
        """What is to be raised."""
        return RuntimeError(self.text) if self.code == "crash" else error_from_code(self.code, self.text)


class Script(Struct, forbid_unknown_fields=True):
    """How the fake node behaves. `delays` in seconds by command name (`container.start`; `*` for all others).

    `stubborn` containers do not obey a graceful stop; `lifetimes` maps an id (or `*`) to the seconds after its start
    when it dies by itself.
    """

    delays: dict[str, float] = {}
    faults: list[Fault] = []
    stubborn: list[str] = []
    lifetimes: dict[str, float] = {}
    cpus: int = 8
    memory: int = 16 * 10**9
    disk: int = 200 * 10**9

    def delay(self, command: str) -> float:
        """Seconds which a command takes."""
        return self.delays.get(command, self.delays.get("*", 0.0))

    def take_fault(self, command: str, container: str, when: str) -> Exception | None:
        """The next fault for this command, which is used up by it."""
        for fault in self.faults:
            matches = fault.command == command and fault.when == when and fault.container in (None, container)
            if matches and fault.times > 0:
                fault.times -= 1
                return fault.error()
        return None


class ScriptFile:
    """A script in a file, read again whenever it was written: a test can change it while the agent runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None

    def newer(self) -> Script | None:
        """The script, if it was written since the last call. Raises InvalidRequest when it cannot be read."""
        try:
            facts = self._path.stat()
        except FileNotFoundError:
            return None
        stamp = (facts.st_mtime_ns, facts.st_ino)
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Script)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"{self._path}: {error}") from None
