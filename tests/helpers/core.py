"""The controller's core without sockets: real store, fleet, services and engine; scripted nodes and images."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import msgspec

from common.clock import ManualClock
from common.commands import (
    AdoptContainer,
    Arguments,
    CopyContainer,
    CreateContainer,
    CreateSnapshot,
    DeleteContainer,
    DeleteSnapshot,
    EndTransfer,
    FreezeContainer,
    PublishContainer,
    ReceiveContainer,
    RenameContainer,
    RenameSnapshot,
    SendContainer,
    SettleAdoption,
    StartContainer,
    StopContainer,
    UnfreezeContainer,
    UpdateContainer,
)
from common.errors import Cancelled, Conflict, DeadlinePassed, NotFound, VzfleetError
from common.failpoints import FailPoints, never
from common.messages import Inventory, Outcome, Progress, Result
from common.reports import ContainerReport, ContainerSpec, ImageReport, NodeFacts, SnapshotReport
from common.states import NodeStatus, Status
from controller.fleet import Fleet
from controller.images.deposits import Deposits
from controller.images.files import ImageFiles, StagedImage
from controller.images.servers import Keep, RemoteSource
from controller.operations.catalogue import KINDS
from controller.operations.engine import Engine
from controller.operations.kinds import Kind, ReportProgress, Resources, Show
from controller.records import Change, Container, Image, Node, NodeMode, Operation, Phase, Snapshot
from controller.relay import Relay
from controller.services.adoptions import Adoptions
from controller.services.caller import Caller
from controller.services.changes import Changes
from controller.services.containers import Containers
from controller.services.drains import Drains
from controller.services.image_pulls import ImagePulls
from controller.services.images import Images, Resolved
from controller.services.moves import Moves
from controller.services.nodes import Nodes
from controller.services.operations import Operations
from controller.services.promises import Promises
from controller.services.publications import Publications
from controller.services.recovery import Recovery
from controller.services.refreshes import Refreshes
from controller.services.remotes import Obtained
from controller.services.requests import ImageSource
from controller.services.snapshots import Snapshots
from controller.services.states import States
from controller.settings import ControllerSettings
from controller.store import containers as container_rows
from controller.store import counters, schema
from controller.store import images as image_rows
from controller.store import nodes as node_rows
from controller.store.db import Database, Transaction

CALLER = Caller("tester", "admin", "tls", "127.0.0.1", "request-1")
FINGERPRINT = "f" * 64
BUILT = Image("b" * 64, "rootfs", 10, {"os": "test"}, (), "test:1", "test.tar", "2026-01-01T00:00:00.000000Z")
FACTS = NodeFacts(
    hostname="host",
    architecture="x86_64",
    cpus=4,
    memory=8 * 10**9,
    disk=100 * 10**9,
    driver="fake",
    driver_version="1",
    storage="btrfs",
    kernel="6.1",
    cgroup="v2",
    agent_version="test",
    capabilities=("disk_limits", "transfers"),
    id_map="1000000:65536",
    transfer_address="tcp://127.0.0.1:8445",
)


STATUS_AFTER: dict[type[Arguments], Status] = {
    StartContainer: Status.RUNNING,
    UnfreezeContainer: Status.RUNNING,
    StopContainer: Status.STOPPED,
    FreezeContainer: Status.FROZEN,
}


@dataclass
class There:
    """A container on a scripted node. `files` says where its files came from."""

    spec: ContainerSpec
    status: Status = Status.STOPPED
    snapshots: set[str] = field(default_factory=set)
    before: ContainerSpec | None = None
    files: str = ""


class ScriptedNodes:
    """The nodes, as the engine sees them through `Dispatch`: each command has its effect once, by its id."""

    def __init__(self, clock: ManualClock, deposits: Deposits) -> None:
        self._clock = clock
        self._deposits = deposits
        self.there: dict[tuple[str, str], There] = {}
        self.journal: dict[str, tuple[str, type[Arguments], Result | Exception]] = {}
        self.abandoned: list[str] = []
        self.acknowledged: set[str] = set()
        self.refusals: dict[type[Arguments], Exception] = {}
        self.refuse: Callable[[str, Arguments], Exception | None] = lambda _node, _arguments: None
        """The same for a command of a node."""
        self.hanging: set[type[Arguments]] = set()
        self.waiting: list[Arguments] = []
        self.commands: list[tuple[str, Arguments]] = []
        """What was carried out, in order, each with its node."""
        self.off: set[str] = set()
        """Nodes whose hosts are off, by an operator's word."""
        self.transfers: set[tuple[str, str]] = set()
        """What transfers keep: node and transfer."""
        self.sent: dict[str, asyncio.Future[There]] = {}
        """By the token of a round: what its sender has sent."""
        self.receiving: dict[str, asyncio.Future[There]] = {}
        """The same by the commands that wait for it."""

    async def call(
        self,
        node: str,
        arguments: Arguments,
        *,
        command: str,
        generation: int,
        deadline: float,
        request: str = "",
        progress: Callable[[Progress], None] | None = None,
    ) -> Result:
        await asyncio.sleep(0)
        if command in self.journal:
            assert self.journal[command][:2] == (node, type(arguments)), "an id means one command for ever"
            return _answered(self.journal[command][2])
        if self._clock.monotonic() >= deadline:
            raise DeadlinePassed("no time was left")
        if type(arguments) in self.hanging:
            self.waiting.append(arguments)
            await asyncio.get_running_loop().create_future()
        refusal = self.refusals.get(type(arguments)) or self.refuse(node, arguments)
        if refusal is not None:
            self.journal[command] = (node, type(arguments), refusal)
            raise refusal
        result: Result | Exception
        try:
            result = Result(command, outcome=await self._outcome(node, arguments, command))
            self.commands.append((node, arguments))
        except (VzfleetError, asyncio.InvalidStateError) as error:
            result = error
        self.journal[command] = (node, type(arguments), result)
        return _answered(result)

    async def _outcome(self, node: str, arguments: Arguments, command: str) -> Outcome:
        if isinstance(arguments, SendContainer):
            return self._send(node, arguments)
        if isinstance(arguments, ReceiveContainer):
            return await self._receive(node, arguments, command)
        if isinstance(arguments, EndTransfer):
            self.transfers.discard((node, arguments.transfer))
            return Outcome()
        if isinstance(arguments, PublishContainer):
            return await self._publish(node, arguments)
        return Outcome(container=self._apply(node, arguments))

    def abandon(self, node: str, command: str) -> None:
        self.abandoned.append(command)
        if command in self.receiving and not self.receiving[command].done():
            self.receiving[command].set_exception(Cancelled("it was given up"))

    def acknowledge(self, node: str, commands: list[str]) -> None:
        self.acknowledged.update(commands)

    def report(self, node: str, container: str) -> ContainerReport:
        """What the node says of a container."""
        there = self.there[node, container]
        spec, snapshots = there.spec, tuple(SnapshotReport(name, 0.0) for name in sorted(there.snapshots))
        return ContainerReport(
            container,
            spec.generation,
            there.status,
            spec.config,
            spec.hostname,
            snapshots=snapshots,
            hwaddr=spec.hwaddr,
        )

    def seen(self) -> dict[tuple[str, str], Any]:
        """All that is on the nodes, to be compared."""
        return {
            key: (
                one.spec.generation,
                one.spec.hostname,
                dict(one.spec.config),
                one.status,
                sorted(one.snapshots),
                one.files,
            )
            for key, one in sorted(self.there.items())
        }

    def _apply(self, node: str, arguments: Arguments) -> ContainerReport | None:
        match arguments:
            case CreateContainer(spec=spec):
                self.there.setdefault((node, spec.id), There(spec))
                return self.report(node, spec.id)
            case CopyContainer(spec=spec):
                files = self._find(node, arguments.source).files
                self._appear(node, spec, There(spec, files=files), arguments.refresh)
                return self.report(node, spec.id)
            case RenameContainer(container=old, spec=spec):
                if (node, old) in self.there:
                    self.there[node, spec.id] = self.there.pop((node, old))
                return self._update(node, spec)
            case UpdateContainer(spec=spec):
                return self._update(node, spec)
            case AdoptContainer() | SettleAdoption():
                return self._adopt(node, arguments)
            case DeleteContainer(container=container):
                self.there.pop((node, container), None)
                return None
            case CreateSnapshot() | DeleteSnapshot() | RenameSnapshot():
                return self._snapshot(node, arguments)
            case _ if type(arguments) in STATUS_AFTER:
                container = cast(StartContainer, arguments).container
                found = self._find(node, container)
                found.status = STATUS_AFTER[type(arguments)]
                self._check_alone(node, found)
            case _:
                return None
        return self.report(node, container)

    def _send(self, node: str, arguments: SendContainer) -> Outcome:
        """It has all been read once it is there: the receiver needs no more of it."""
        found = self._find(node, arguments.container)
        if arguments.moving and arguments.last and found.status is not Status.STOPPED:
            raise Conflict(f"container {arguments.container} is running")
        self.transfers.add((node, arguments.route.transfer))
        sent = self.sent.setdefault(arguments.route.token, asyncio.get_running_loop().create_future())
        if not sent.done():
            sent.set_result(replace(found, snapshots=set(found.snapshots) if arguments.with_snapshots else set()))
        return Outcome(bytes=_size(arguments.route.round), seconds=2.0)

    async def _receive(self, node: str, arguments: ReceiveContainer, command: str) -> Outcome:
        route, spec = arguments.route, arguments.spec
        sent = self.sent.setdefault(route.token, asyncio.get_running_loop().create_future())
        came = await self._or_given_up(sent, command)
        self.transfers.add((node, route.transfer))
        report = None
        if arguments.last:
            made = There(spec, snapshots=set(came.snapshots), files=came.files)
            self._appear(node, spec, made, arguments.refresh)
            report = self.report(node, spec.id)
        return Outcome(container=report, bytes=_size(route.round), seconds=2.0)

    async def _publish(self, node: str, arguments: PublishContainer) -> Outcome:
        """What it sends is its files."""
        content = self._find(node, arguments.container).files.encode()
        operation = arguments.path.rpartition("/")[2]
        staged = self._deposits.begin(operation, arguments.token)
        await staged.write(content)
        await self._deposits.finish(operation, staged)
        return Outcome(bytes=len(content))

    async def _or_given_up(self, sent: asyncio.Future[There], command: str) -> There:
        given_up = self.receiving[command] = asyncio.get_running_loop().create_future()
        await asyncio.wait({sent, given_up}, return_when=asyncio.FIRST_COMPLETED)
        return sent.result() if sent.done() else given_up.result()

    def _appear(self, node: str, spec: ContainerSpec, made: There, refresh: bool) -> None:
        if refresh:
            there = self._find(node, spec.id)
            assert there.spec == spec and there.status is Status.STOPPED
            there.files = made.files
        else:
            self.there.setdefault((node, spec.id), made)

    def _snapshot(self, node: str, arguments: CreateSnapshot | DeleteSnapshot | RenameSnapshot) -> ContainerReport:
        snapshots = self._find(node, arguments.container).snapshots
        if isinstance(arguments, RenameSnapshot):
            if not {arguments.snapshot, arguments.new} & snapshots:
                raise NotFound(f"container {arguments.container} has no snapshot {arguments.snapshot}")
            snapshots.add(arguments.new)
        if isinstance(arguments, CreateSnapshot):
            snapshots.add(arguments.snapshot)
        else:
            snapshots.discard(arguments.snapshot)
        return self.report(node, arguments.container)

    def _check_alone(self, node: str, one: There) -> None:
        others = [there for (other, _), there in self.there.items() if other not in (node, *self.off)]
        same = [there for there in others if there.spec.hwaddr == one.spec.hwaddr]
        assert one.status is Status.STOPPED or all(there.status is Status.STOPPED for there in same), "it runs twice"

    def _adopt(self, node: str, arguments: AdoptContainer | SettleAdoption) -> ContainerReport:
        if isinstance(arguments, AdoptContainer):
            one = self._find(node, arguments.spec.id)
            one.before, one.spec = one.spec, arguments.spec
            return self.report(node, arguments.spec.id)
        one = self._find(node, arguments.container)
        if one.before is not None:
            one.spec, one.before = one.spec if arguments.keep else one.before, None
        return self.report(node, arguments.container)

    def _find(self, node: str, container: str) -> There:
        if (node, container) not in self.there:
            raise NotFound(f"container {container} is not on {node}")
        return self.there[node, container]

    def _update(self, node: str, spec: ContainerSpec) -> ContainerReport:
        self._find(node, spec.id).spec = spec
        return self.report(node, spec.id)


def _answered(result: Result | Exception) -> Result:
    if isinstance(result, Exception):
        raise result
    return result


def _size(round: int) -> int:
    """Bytes that a round takes: the first ones are worth another."""
    return 10_000_000 // 4**round


class ScriptedImages:
    """Images that are there at once."""

    def __init__(self, store: Database) -> None:
        self._store = store

    def resolve(self, source: ImageSource, caller: Caller | None = None, node: str | None = None) -> Resolved:
        return Resolved(None, BUILT.source, {"os": "test"}, "x86_64", {"properties": {"os": "test"}})

    async def obtain(self, source: str, properties: dict[str, str], report: ReportProgress) -> Image:
        report("building", 50)
        return await self._put(BUILT)

    def check_aliases(self, aliases: tuple[str, ...]) -> None:
        """All are free."""

    async def hold(self, staged: StagedImage) -> str:
        staged.discard()
        return "c" * 64

    async def import_upload(
        self,
        upload: str,
        filename: str,
        aliases: tuple[str, ...],
        offset: int = 0,
        *,
        public: bool = False,
        expires_at: str | None = None,
    ) -> Image:
        return await self._put(msgspec.structs.replace(BUILT, fingerprint="c" * 64, aliases=aliases))

    async def pull(self, remote: RemoteSource, keep: Keep, hear: Show) -> Obtained:
        hear({"stage": "downloading", "percent": 50})
        return Obtained(
            await self._put(msgspec.structs.replace(BUILT, fingerprint="d" * 64, aliases=keep.aliases)), "1"
        )

    async def pull_url(self, url: str, expected: str, keep: Keep, hear: Show) -> Image:
        return await self._put(msgspec.structs.replace(BUILT, fingerprint="d" * 64, aliases=keep.aliases))

    async def refresh(self, fingerprint: str, hear: Show) -> Obtained:
        return Obtained(await self._put(msgspec.structs.replace(BUILT, fingerprint="e" * 64)), "2")

    async def _put(self, image: Image) -> Image:
        def write(transaction: Transaction) -> Image:
            present = image_rows.rows.get(transaction.connection, image.fingerprint)
            return present or image_rows.rows.insert(transaction, image)

        return await self._store.write(write)

    async def forget(self, fingerprint: str) -> None:
        await self._store.write(lambda transaction: image_rows.rows.delete(transaction, fingerprint))

    def ticket(self, fingerprint: str, operation: str) -> str:
        return f"{operation}.{fingerprint}"


class Core:
    """A controller's core on an empty database with two nodes, n1 and n2."""

    def __init__(self, directory: Path) -> None:
        self.clock = ManualClock()
        self.fleet = Fleet(self.clock)
        self.changes_seen: list[Change] = []
        self.store = Database(f"sqlite:///{directory / 'core.db'}", self._committed)
        self.nodes = Nodes(self.store, self.fleet, ControllerSettings(state=directory), self.clock)
        self.deposits = Deposits(ImageFiles(directory / "images"), b"key", 10**6)
        self.there = ScriptedNodes(self.clock, self.deposits)
        self.strays: set[tuple[str, str, int]] = set()
        """Containers of nobody's that a test has put on a node: node, id, generation."""
        self.images = ScriptedImages(self.store)
        self.drains = Drains(self.clock)
        self.resources = Resources(
            self.fleet,
            self.there,
            self.images,
            Relay(),
            self.clock,
            self.drains,
            servers=cast(Any, self.images),
            deposits=self.deposits,
        )
        self.use_engine()

    def _committed(self, changes: Any) -> None:
        self.changes_seen.extend(changes)
        self.fleet.apply(changes)

    def use_engine(self, kinds: Mapping[str, Kind] = KINDS, failpoints: FailPoints = never) -> None:
        """A new engine, as after a restart, and the services upon it."""
        self.engine = Engine(self.store, kinds, self.resources, self.there.acknowledge, failpoints)
        self.operations = Operations(self.store, self.engine, Promises(self.store, self.clock, 86400.0), self.clock)
        images = cast(Images, self.images)
        self.containers = Containers(self.store, self.fleet, self.nodes, images, self.operations, self.clock)
        self.changes = Changes(self.containers)
        self.moves = Moves(self.containers, self.changes)
        self.states = States(self.containers)
        self.snapshots = Snapshots(self.containers, self.clock)
        self.refreshes = Refreshes(self.containers)
        pulls = ImagePulls(images, cast(Any, images), cast(Any, images), self.operations)
        self.publications = Publications(self.containers, pulls)
        self.recovery = Recovery(self.containers, images)
        self.adoptions = Adoptions(self.containers, self.clock)
        self.drains.use(self.containers, self.moves, self.states)

    async def open(self) -> None:
        """Open the store and bring both nodes up: n1 has c (running, a snapshot s0), d (stopped) and z (frozen)."""
        await self.store.open()
        await self.store.write(self._fill)
        for name in ("n1", "n2"):
            reports = tuple(self.there.report(node, id) for node, id in self.there.there if node == name)
            held = (ImageReport(FINGERPRINT, 1),)
            self.fleet.inventory(name, Inventory(FACTS, reports, held))
            self.fleet.node_status(name, NodeStatus.ONLINE, "")

    def _fill(self, transaction: Transaction) -> None:
        for name in ("n1", "n2"):
            node_rows.rows.insert(transaction, Node(name, name * 20, "2026-01-01T00:00:00.000000Z", FACTS))
        image_rows.rows.insert(transaction, msgspec.structs.replace(BUILT, fingerprint=FINGERPRINT, source=""))
        for id, status in (("c", Status.RUNNING), ("d", Status.STOPPED), ("z", Status.FROZEN)):
            generation = counters.advance(transaction, "generation")
            config = {"limits.memory": "100MB"}
            spec = ContainerSpec(id, generation, id, f"00:16:3e:00:00:{generation:02x}", config)
            row = Container(
                id=id,
                node="n1",
                generation=generation,
                hostname=id,
                description="",
                config=config,
                image=None,
                hwaddr=spec.hwaddr,
                created_at="2026-01-01T00:00:00.000000Z",
                phase=Phase.READY,
                reserved_memory=100 * 10**6,
            )
            container_rows.rows.insert(transaction, row)
            self.there.there["n1", id] = There(spec, status, files=f"those of {id}")
        container_rows.add_snapshot(transaction, Snapshot("c", "s0", row.created_at, row.config))
        self.there.there["n1", "c"].snapshots.add("s0")

    async def close(self) -> None:
        """Stop the engine and close the store."""
        await self.engine.close()
        await self.store.close()

    async def rows(self) -> dict[str, Container]:
        """The containers as they are stored."""
        stored = await self.store.read(container_rows.rows.all)
        return {row.id: row for row in stored}

    async def fence(self, name: str) -> None:
        """A node's host is off, by an operator's word."""

        def write(transaction: Transaction) -> None:
            record = node_rows.require(transaction, name)
            fenced = msgspec.structs.replace(
                record, mode=NodeMode.FENCED, fenced_at="2026-01-02T00:00:00.000000Z", fenced_by="tester"
            )
            node_rows.rows.replace(transaction, fenced)

        await self.store.write(write)
        self.there.off.add(name)

    def records_of(self, operation: str) -> list[Operation]:
        """Every state of an operation that was committed, in order."""
        found = [change.record for change in self.changes_seen if change.key == operation]
        return [record for record in found if isinstance(record, Operation)]


def make_template(directory: Path) -> Path:
    """An empty database at the present schema, to be copied: migrations take their time."""
    template = directory / "template.db"
    schema.upgrade(f"sqlite:///{template}")
    return template


async def open_core(template: Path, directory: Path) -> Core:
    """A core on its own copy of the database."""
    directory.mkdir(exist_ok=True)
    shutil.copy(template, directory / "core.db")
    core = Core(directory)
    await core.open()
    return core
