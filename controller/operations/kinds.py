"""What an operation is made of: a kind with its steps, and the context in which a step runs."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from common.clock import Clock
from common.commands import Arguments, DeleteContainer, RenameContainer
from common.errors import Abandoned, Conflict, Internal, NoSpace, Unsupported
from common.messages import Outcome, Progress, Result
from controller.fleet import Fleet
from controller.images.deposits import Deposits
from controller.images.files import StagedImage
from controller.images.servers import Keep, RemoteSource
from controller.operations.machine import Shape
from controller.records import Image, Operation
from controller.relay import Relay
from controller.store.db import Transaction

T = TypeVar("T")
ReportProgress = Callable[[str, int | None], None]
Heard = Callable[[Progress], None]
Show = Callable[[dict[str, Any]], None]
ROOM_RETRY = 2.0
"""Seconds between two tries of what a full disk refuses."""


class Dispatch(Protocol):
    """How a command reaches a node: `controller.dispatch.dispatcher`, or a test's double."""

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
    ) -> Result: ...

    def abandon(self, node: str, command: str) -> None: ...


class ImageSupply(Protocol):
    """Where the controller gets images from: `controller.services.images`, or a test's double."""

    async def obtain(self, source: str, properties: dict[str, str], report: ReportProgress) -> Image:
        """The image of a builder's key, built when the controller does not have it."""
        ...

    async def hold(self, staged: StagedImage) -> str:
        """Keep a complete upload until `import_upload`; its fingerprint."""
        ...

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
        """Keep an uploaded file as an image, if it is one; a split one's second file begins at `offset`."""
        ...

    async def forget(self, fingerprint: str) -> None:
        """Remove an image's file and row."""
        ...

    def ticket(self, fingerprint: str, operation: str) -> str:
        """A token good for fetching that file for that operation."""
        ...


class Obtained(Protocol):
    """An image that is here now, and its version on its server where that is known."""

    @property
    def image(self) -> Image: ...

    @property
    def serial(self) -> str: ...


class RemoteImages(Protocol):
    """Where images of other servers come from: `controller.services.remotes`, or a test's double.

    Each is told where to report how far it is.
    """

    async def obtain(self, remote: RemoteSource, hear: Show) -> Obtained:
        """The newest image that is meant, to be forgotten when nobody uses it."""
        ...

    async def pull(self, remote: RemoteSource, keep: Keep, hear: Show) -> Obtained:
        """The same, as one's own."""
        ...

    async def pull_url(self, url: str, expected: str, keep: Keep, hear: Show) -> Image:
        """What a URL leads to, as one's own image."""
        ...

    async def refresh(self, fingerprint: str, hear: Show) -> Obtained:
        """The newest version of an image, which takes its place."""
        ...


class Evacuation(Protocol):
    """How containers leave a node and come back: `controller.services.drains`, or a test's double.

    Each container is a child: an operation of its own, accepted as a user's would be.
    """

    async def gathered(self) -> None:
        """Return when the nodes had time to connect since the controller's start."""
        ...

    async def waiting(self, operation: Operation) -> list[str]:
        """The containers with which it still has to do something, in their order."""
        ...

    async def begin(self, operation: Operation, container: str) -> Operation:
        """Have a child begin. Raises Busy, NoPlacement or what else refuses it."""
        ...

    async def children(self, operation: Operation) -> list[Operation]:
        """All children that were begun, in their order."""
        ...

    async def ended(self, operation: str) -> Operation:
        """An operation once it has ended. Raises NotFound."""
        ...


@dataclass(frozen=True)
class Resources:
    """What steps may use. `evacuation` is None where no node is ever drained.

    `servers` is None where no image comes from elsewhere, `deposits` where none is published.
    `transfer_key` is what the tokens of transfers are derived from: the same after a restart of the controller.
    """

    fleet: Fleet
    dispatch: Dispatch
    images: ImageSupply
    relay: Relay
    clock: Clock
    evacuation: Evacuation | None = None
    transfer_key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    servers: RemoteImages | None = None
    deposits: Deposits | None = None


@dataclass
class Context:
    """One operation under way. `deadline` is on the monotonic clock; `tell` adds to the operation's metadata, `show` is
    how far it is.

    `answered` are commands to be acknowledged, `underway` those not answered yet, each with its node and call; `lost`
    are nodes that an operator gave up on; `place` and `step` (an index) say which step it is at. `patient`: what a full
    disk refuses is tried again until the deadline, since nothing else can be done about it. `again`: an earlier life of
    the controller may have begun with this step.
    """

    operation: Operation
    resources: Resources
    deadline: float
    report: ReportProgress
    progress: Callable[[Progress], None]
    tell: Callable[[dict[str, Any]], None]
    show: Show
    place: str = ""
    step: int = 0
    answered: list[tuple[str, str]] = field(default_factory=list)
    underway: dict[str, tuple[str, asyncio.Task[Result]]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    patient: bool = False
    again: bool = False

    @property
    def remote_images(self) -> RemoteImages:
        """The images of other servers. Raises Unsupported where there are none."""
        if self.resources.servers is None:
            raise Unsupported("images of other servers are not had here")
        return self.resources.servers

    @property
    def deposits(self) -> Deposits:
        """Where nodes send images. Raises Unsupported where none is published."""
        if self.resources.deposits is None:
            raise Unsupported("no images are published here")
        return self.resources.deposits

    def parameters(self, kind: type[T]) -> T:
        """What the operation was accepted with, typed."""
        return msgspec.convert(self.operation.parameters, type=kind)

    async def command(
        self, node: str, arguments: Arguments, generation: int, part: str = "", heard: Heard | None = None
    ) -> Outcome:
        """Have a node do something, at most once for this step; `part` tells apart two commands of one step.

        `heard` takes what the node says of its progress, in place of the operation. Raises what the node answers,
        DeadlinePassed, and Abandoned when the node was given up on.
        """
        for attempt in itertools.count(2):
            try:
                return await self._command(node, arguments, generation, part, heard)
            except NoSpace:
                if not self.patient or self.resources.clock.monotonic() + ROOM_RETRY >= self.deadline:
                    raise
            await asyncio.sleep(ROOM_RETRY)
            # What was refused is never run: each try is a command of its own.
            part = f"{part.partition('~')[0]}~{attempt}"
        raise AssertionError("the tries do not end")

    async def _command(
        self, node: str, arguments: Arguments, generation: int, part: str, heard: Heard | None
    ) -> Outcome:
        command = f"{self.operation.id}/{self.place}{part}"
        if node in self.lost:
            raise _abandoned(node)
        call = self.resources.dispatch.call(
            node,
            arguments,
            command=command,
            generation=generation,
            deadline=self.deadline,
            request=self.operation.request,
            progress=heard or self.progress,
        )
        task = asyncio.ensure_future(call)
        self.underway[command] = (node, task)
        try:
            result = await task
        except asyncio.CancelledError:
            # Either this call was given up, or the step that makes it is cancelled.
            if node not in self.lost or _is_cancelled():
                raise
            raise _abandoned(node) from None
        finally:
            del self.underway[command]
            # A failure is a result too, and one that comes late is acknowledged when it does.
            self.answered.append((node, command))
        if result.outcome is None:
            raise Internal(f"node {node} answered {command} with neither outcome nor error")
        if isinstance(arguments, DeleteContainer | RenameContainer):
            self.resources.fleet.gone(node, arguments.container)
        self.resources.fleet.outcome(node, result.outcome, result.sampled_at)
        return result.outcome

    @property
    def refused(self) -> bool:
        """Whether the step to be undone made nothing, since another thing stands in its place that is not ours."""
        error = self.operation.error
        return error is not None and error.code == Conflict.code and error.step == self.step

    def give_up(self, node: str, part: str) -> None:
        """Have a node give up one command of this step; it then ends by itself."""
        self.resources.dispatch.abandon(node, f"{self.operation.id}/{self.place}{part}")

    def abandon(self) -> None:
        """Have the nodes give up what they do for this operation; the step then ends by itself."""
        for command, (node, _) in self.underway.items():
            self.resources.dispatch.abandon(node, command)

    def lose(self, nodes: set[str]) -> None:
        """Wait for these nodes no more, now and later: their commands fail with Abandoned."""
        self.lost |= nodes
        for node, call in list(self.underway.values()):
            if node in nodes:
                call.cancel()


def _abandoned(node: str) -> Abandoned:
    return Abandoned(f"node {node} was given up on; what it did is not known until it is back")


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


Do = Callable[[Context], Awaitable[Any]]
Undo = Callable[[Context], Awaitable[None]]
Write = Callable[[Transaction, Operation], None]


@dataclass(frozen=True)
class Step:
    """A named step. `do` returns its output (plain JSON values); `undo` finds nothing to do when `do` did nothing.

    `write` changes rows in the transaction that records the step as done.
    """

    name: str
    do: Do
    undo: Undo | None = None
    write: Write | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of operation. `timeout` in seconds; `succeeded` and `failed` write rows in the last transaction.

    Steps from `no_return` on (an index) are neither undone nor interrupted.
    """

    name: str
    description: str
    steps: tuple[Step, ...]
    timeout: float
    succeeded: Write
    failed: Write
    no_return: int | None = None

    @property
    def shape(self) -> Shape:
        """What the state machine must know of it."""
        end = len(self.steps) if self.no_return is None else self.no_return
        return Shape(tuple(step.undo is not None and i < end for i, step in enumerate(self.steps)), end)
