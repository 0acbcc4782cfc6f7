"""Work that waits for its turn: so much at once on one node, and so much in the whole fleet."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable

from common.tasks import Tasks

Work = Callable[[str], Awaitable[None]]


class Turns:
    """Calls `work` for each container that was put in, in turns between the nodes, each container once at a time.

    One that is put in while it waits waits on; one that is put in while it is worked on gets another turn afterwards.
    """

    def __init__(self, work: Work, tasks: Tasks, *, together: int, on_a_node: int) -> None:
        """At most `together` at once, and `on_a_node` of one node."""
        self._work = work
        self._tasks = tasks
        self._together = together
        self._on_a_node = on_a_node
        self._waiting: dict[str, deque[str]] = {}
        """Containers by node; the node whose turn comes next is the first."""
        self._waits: set[str] = set()
        self._again: dict[str, str] = {}
        self._working: dict[str, str] = {}
        self._at_work: Counter[str] = Counter()
        self._closed = False

    def close(self) -> None:
        """Begin nothing more; the tasks' owner ends what is under way."""
        self._closed = True

    def __len__(self) -> int:
        """How many wait or are worked on."""
        return len(self._waits | self._working.keys())

    def put(self, container: str, node: str) -> None:
        """Have a container's turn come."""
        if container in self._working:
            self._again[container] = node
        elif container not in self._waits:
            self._waits.add(container)
            self._waiting.setdefault(node, deque()).append(container)
        self._go_on()

    def _go_on(self) -> None:
        while not self._closed and len(self._working) < self._together and (following := self._next()) is not None:
            container, node = following
            self._working[container] = node
            self._at_work[node] += 1
            self._tasks.start(self._turn(container, node), f"turn of {container}")

    def _next(self) -> tuple[str, str] | None:
        for node, containers in self._waiting.items():
            if self._at_work[node] < self._on_a_node:
                container = containers.popleft()
                self._waits.discard(container)
                # The other nodes come first now.
                del self._waiting[node]
                if containers:
                    self._waiting[node] = containers
                return container, node
        return None

    async def _turn(self, container: str, node: str) -> None:
        try:
            await self._work(container)
        finally:
            del self._working[container]
            self._at_work[node] -= 1
            again = self._again.pop(container, None)
            if again is not None:
                self.put(container, again)
            self._go_on()
