"""What must hold in every simulation: while it runs, soon after everything has healed, and at its end."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from common.codec import decode_from_agent
from common.messages import Result
from common.states import NodeStatus, Status, may_follow
from controller.records import Change, Container, Operation, Phase
from controller.services.containers import spec_of
from controller.store import containers as container_rows
from controller.store import counters
from controller.store import operations as operation_rows
from controller.store.db import Transaction
from tests.failure.simulation.controller import Controller
from tests.failure.simulation.host import Effect, Host
from tests.failure.simulation.trace import Trace

NOT_UNDONE = "could not be undone"
MUST_HAVE: dict[str, dict[tuple[str, ...], str]] = {
    "container.create": {("create/do",): "container.create"},
    "container.move": {("rest/do-receive", "rest/do-receive-relayed"): "container.receive"},
    "snapshot.create": {("take/do",): "snapshot.create"},
    "snapshot.delete": {("remove/do",): "snapshot.delete"},
}
"""Steps (one of several) whose effect a successful operation must have had exactly once, whatever it found."""


class Invariants:
    """Watches a world. `violations` says what did not hold."""

    def __init__(self, controller: Controller, hosts: Mapping[str, Host], trace: Trace) -> None:
        self.violations: list[str] = []
        self.accepted: dict[str, None] = {}
        self.excused: set[str] = set()
        """Containers of which an operation said that it could not clean up, and such operations."""
        self.ended: Counter[str] = Counter()
        self._controller = controller
        self._hosts = hosts
        self._trace = trace
        self._history: dict[str, list[Operation]] = {}
        self._effects: Counter[str] = Counter()
        self._since_disturbed: Counter[tuple[str, str, str]] = Counter()
        controller.on_commit = self._committed
        for host in hosts.values():
            host.on_effect = self._happened

    def violation(self, text: str) -> None:
        """Something that must hold does not."""
        self._trace.note("VIOLATION", text)
        self.violations.append(f"{self._trace.now:.3f} s: {text}")

    def fault(self, fault: BaseException) -> None:
        """Something failed that nobody expected to."""
        self.violation("".join(traceback.format_exception(fault)))

    def accept(self, operation: str) -> None:
        """A client was told 202."""
        self.accepted[operation] = None

    # ------------------------------------------------------------ while it runs

    def disturbed(self, host: str, container: str | None = None) -> None:
        """A container (or all of a host) stopped by itself: what had started it may start it again."""
        for key in list(self._since_disturbed):
            if key[0] == host and container in (None, key[1]):
                del self._since_disturbed[key]

    def _happened(self, effect: Effect) -> None:
        if effect.cause:
            self._effects[effect.cause] += 1
            key = (effect.host, effect.target, effect.cause)
            self._since_disturbed[key] += 1
            if self._since_disturbed[key] > 1:
                self.violation(f"I2 {effect.cause} had its effect twice: {effect.command} {effect.target}")
        container = self._hosts[effect.host].node.world.containers.get(effect.target)
        if container is not None and container.running:
            self._check_alone(effect.host, container.spec.hwaddr)

    def _check_alone(self, host: str, hwaddr: str) -> None:
        for other in self._hosts.values():
            if other.name == host:
                continue
            for container in other.node.world.containers.values():
                if container.running and container.spec.hwaddr == hwaddr:
                    self.violation(f"I3 {container.spec.id} runs on {host} and on {other.name}")

    def _committed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if isinstance(change.record, Operation):
                self._history.setdefault(change.key, []).append(change.record)

    # ------------------------------------------------------------ soon after healing

    def in_sight(self) -> bool:
        """I5: what the API says is what the nodes have, for all on which no operation works."""
        return self.not_in_sight() is None

    def not_in_sight(self) -> str | None:
        """The first thing that the API shows otherwise."""
        return next(self._unseen(), None)

    def _unseen(self) -> Iterator[str]:
        services = self._controller.services
        if services is None:
            yield "the controller does not answer"
            return
        fleet = services.fleet
        for name, host in self._hosts.items():
            node = fleet.nodes[name]
            if node.status is not NodeStatus.ONLINE:
                yield f"{name} is {node.status}: {node.reason}"
            busy = {id for id, live in fleet.containers.items() if live.record.operation is not None}
            known = {id for id in node.containers if fleet.containers[id].report is not None} | set(node.unclaimed)
            there = set(host.node.world.containers)
            if known - busy != there - busy:
                yield f"{name} has {sorted(there - busy)}, {sorted(known - busy)} is shown"
        for live in fleet.containers.values():
            record = live.record
            there_is = self._hosts[record.node].node.world.containers.get(record.id)
            if record.operation is not None or record.phase is not Phase.READY:
                continue
            shown = fleet.status_of(live)
            if there_is is None or there_is.spec.generation != record.generation:
                if shown.status is not Status.ERROR:
                    yield f"{record.id} is not on {record.node}, and shown as {shown.status.name}"
            elif shown.status != there_is.status:
                yield f"{record.id} is {Status(there_is.status).name} on {record.node}, shown as {shown}"

    def all_ended(self) -> bool:
        """I1: no operation is unfinished."""
        return not self.unfinished()

    def unfinished(self) -> list[str]:
        """Operations that have not ended."""
        connection = self._controller.disk.connection
        try:
            return [f"{one.id} {one.kind}" for one in operation_rows.unfinished(connection)]
        finally:
            connection.rollback()

    def settled(self) -> bool:
        """Everything that is told with some delay was told."""
        return self.in_sight() and not any(self._unacknowledged())

    def unacknowledged_hosts(self) -> list[str]:
        """Hosts that would tell results again."""
        return [host.name for host in self._hosts.values() if any(_waiting(host))]

    def _unacknowledged(self) -> Iterator[str]:
        for host in self._hosts.values():
            for id in _waiting(host):
                yield f"{host.name} still tells the result of {id}"

    # ------------------------------------------------------------ at the end

    def check_end(self) -> None:
        """All that must hold once nothing is under way."""
        for part in (self._controller, *self._hosts.values()):
            for fault in part.faults:
                self.fault(fault)
        if self._controller.services is None:
            self.violation("I5 the controller does not answer")
            return
        connection = self._controller.disk.connection
        try:
            operations = {one.id: one for one in operation_rows.rows.all(connection)}
            containers = container_rows.rows.all(connection)
            snapshots: dict[str, set[str]] = {one.id: set() for one in containers}
            for snapshot in container_rows.all_snapshots(connection):
                snapshots[snapshot.container].add(snapshot.name)
            highest = {name: counters.advance(Transaction(connection), name) for name in ("epoch", "generation")}
        finally:
            connection.rollback()
        for operation in operations.values():
            self._excuse(operation)
        self._check_operations(operations)
        self._check_effects(operations)
        self._check_journals(operations, highest)
        self._check_rows(containers, snapshots)
        self._check_leftovers(containers)
        if (unseen := self.not_in_sight()) is not None:
            self.violation(f"I5 {unseen}")

    def _excuse(self, operation: Operation) -> None:
        failed = operation.error is not None and NOT_UNDONE in operation.error.text
        # A deletion cannot be taken back: when it fails, the container may be gone, and is shown so.
        failed |= operation.kind == "container.delete" and operation.status is not Status.SUCCESS
        if failed or "left_behind" in str(operation.outputs) or operation.parameters.get("row_only"):
            self.excused.update(operation.containers, (operation.id,))

    def _check_operations(self, operations: Mapping[str, Operation]) -> None:
        for id in self.accepted:
            if id not in operations:
                self.violation(f"I1 the accepted operation {id} is not known any more")
        for operation in operations.values():
            self.ended[operation.status.name] += 1
            if not operation.status.final or operation.ended_at is None:
                self.violation(f"I1 operation {operation.id} {operation.kind} has not ended: {operation.status.name}")
            elif operation.status is not Status.SUCCESS and not (operation.error and operation.error.text):
                self.violation(f"I1 operation {operation.id} {operation.kind} failed without a reason")
        for id, records in self._history.items():
            for before, after in pairwise(records):
                if not _follows(before.status, after.status):
                    self.violation(f"I1 operation {id} went from {before.status.name} to {after.status.name}")

    def _check_effects(self, operations: Mapping[str, Operation]) -> None:
        for operation in operations.values():
            if operation.status is not Status.SUCCESS:
                continue
            for places, command in MUST_HAVE.get(operation.kind, {}).items():
                times = sum(self._effects[f"{operation.id}/{place}"] for place in places)
                if times != 1:
                    self.violation(
                        f"I2 {operation.kind} {operation.id} says Success, and {command} happened {times} times"
                    )

    def _check_journals(self, operations: Mapping[str, Operation], highest: Mapping[str, int]) -> None:
        for text in self._unacknowledged():
            self.violation(f"I4 {text}")
        for host in self._hosts.values():
            for id, packed, _ in host.journal.rows():
                operation = operations.get(id.partition("/")[0])
                if operation is None:
                    self.violation(f"I4 {host.name} was given {id}, of which no row tells")
                elif packed is None and operation.status is Status.SUCCESS and "/do-send" not in id:
                    self.violation(f"I4 {id} has not ended on {host.name}, and its operation says Success")
                elif packed is not None and not isinstance(decode_from_agent(packed), Result):
                    self.violation(f"I4 {host.name} holds no result for {id}")
            fences = dict(host.journal.database.execute("SELECT container, generation FROM generations"))
            if any(generation >= highest["generation"] for generation in fences.values()):
                self.violation(f"I4 {host.name} knows a generation that was never given")

    def _check_rows(self, containers: Sequence[Container], snapshots: Mapping[str, set[str]]) -> None:
        services = self._controller.services
        assert services is not None
        for row in containers:
            if row.operation is not None:
                self.violation(f"I6 {row.id} is still held by operation {row.operation}")
            if row.phase is Phase.CREATING:
                self.violation(f"I6 {row.id} is still being created")
            wanted = (0, 0) if row.phase is Phase.FAILED else services.containers.reservation(row.config, row.node)
            if (row.reserved_memory, row.reserved_disk) != wanted:
                self.violation(f"I6 {row.id} reserves {(row.reserved_memory, row.reserved_disk)} instead of {wanted}")
            if row.phase is Phase.READY and row.id not in self.excused:
                self._check_row(row, snapshots[row.id])
        live = {id: live.record for id, live in services.fleet.containers.items()}
        if live != {row.id: row for row in containers}:
            self.violation("I5 the controller's memory and its rows differ")

    def _check_row(self, row: Container, snapshots: set[str]) -> None:
        there = self._hosts[row.node].node.world.containers.get(row.id)
        if there is None:
            self.violation(f"I4 {row.id} has a row, and is not on {row.node}")
            return
        if there.spec != spec_of(row):
            self.violation(f"I4 {row.id} on {row.node} is {there.spec}, its row says {spec_of(row)}")
        if {snapshot.name for snapshot in there.snapshots} != snapshots:
            names = sorted(snapshot.name for snapshot in there.snapshots)
            self.violation(f"I4 {row.id} on {row.node} has snapshots {names}, its rows say {sorted(snapshots)}")

    def _check_leftovers(self, containers: Sequence[Container]) -> None:
        services = self._controller.services
        assert services is not None
        owned = {(row.node, row.id, row.generation) for row in containers if row.phase is Phase.READY}
        for host in self._hosts.values():
            for id, container in host.node.world.containers.items():
                key = (host.name, id, container.spec.generation)
                if key not in owned and id not in self.excused:
                    self.violation(f"I6 {id} of generation {container.spec.generation} was left on {host.name}")
            for transfer in host.node.world.transfers.keys() - self.excused:
                self.violation(f"I6 what transfer {transfer} keeps was left on {host.name}")
        if services.relay.open_ways:
            self.violation(f"I6 ways are still open: {sorted(services.relay.open_ways)}")


def _follows(before: Status, after: Status) -> bool:
    """Whether one committed state may come after another; that a cancel was asked for is written by itself."""
    if before is Status.RUNNING and after is Status.CANCELLED:
        return True
    return (before is after and not before.final) or may_follow(before, after)


def _waiting(host: Host) -> list[str]:
    """The commands whose results nobody has acknowledged to the host."""
    return [id for id, result, acknowledged in host.journal.rows() if result is not None and not acknowledged]
