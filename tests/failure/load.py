"""A steady load of mixed operations on a fleet, from a thread of its own, and what was acknowledged to it."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.failure.fleet import ProcessFleet
from tests.failure.points import Effects
from tests.failure.scenarios import EMPTY

LOOK_EVERY = 0.5
EFFECTS: dict[str, Effects] = {
    "create": [("create/do", "container.create")],
    "create and start": [("create/do", "container.create"), ("start/do", "container.start")],
    "delete": [("delete/do", "container.delete")],
    "update": [("update/do", "container.update")],
    "rename": [("rename/do", "container.rename")],
    "snapshot": [("take/do", "snapshot.create")],
    "copy": [("copy/do-receive", "container.receive")],
    "move": [("rest/do-receive", "container.receive"), ("clean/do", "container.delete")],
}
"""What each action does at the driver, once, when it says Success. One that starts or stops a container may find that a
cancelled one before has done so."""


@dataclass
class Accepted:
    """What was answered with 202: the actions by operation; and what became of all other requests, by code."""

    actions: dict[str, str] = field(default_factory=dict)
    others: Counter[int] = field(default_factory=Counter)
    cancels: int = 0

    @property
    def expected(self) -> dict[str, Effects]:
        """What each must have done if it says Success."""
        return {identity: EFFECTS.get(action, []) for identity, action in self.actions.items()}


class Load:
    """`rate` operations a second on about `population` containers, chosen from a seed and from what the API shows."""

    def __init__(self, fleet: ProcessFleet, seed: int, rate: float = 20.0, population: int = 40) -> None:
        self.accepted = Accepted()
        self._fleet = fleet
        self._random = random.Random(seed)
        self._pause = 1.0 / rate
        self._population = population
        self._stop = threading.Event()
        self._shown: list[dict[str, Any]] = []
        self._looked = 0.0
        self._failure: BaseException | None = None

    @contextmanager
    def running(self) -> Iterator[Accepted]:
        """The load is on within the block. Raises what its thread met."""
        thread = threading.Thread(target=self._run, name="load")
        thread.start()
        try:
            yield self.accepted
        finally:
            self._stop.set()
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while not self._stop.is_set():
                self._act()
                due = max(due + self._pause, time.monotonic() - 1.0)
                self._stop.wait(max(0.0, due - time.monotonic()))
        except BaseException as error:
            self._failure = error

    def _act(self) -> None:
        if time.monotonic() - self._looked > LOOK_EVERY:
            answer = self._fleet.request("GET", "/1.0/vz?recursion=1")
            if answer.code == 200:
                self._shown, self._looked = answer.metadata, time.monotonic()
        if self._random.random() < 0.05 and self.accepted.actions:
            self._cancel()
            return
        # One at a time, so that most are not busy with the one before; what is chosen now is looked at anew later.
        free = [view for view in self._shown if view["status"]["status"] in ("Running", "Stopped", "Error")]
        if len(self._shown) < self._population and (not free or self._random.random() < 0.3):
            self._create()
        elif free:
            view = self._random.choice(free)
            self._shown.remove(view)
            self._change(view)

    def _ask(self, action: str, method: str, path: str, body: Any = None) -> None:
        answer = self._fleet.request(method, path, body)
        if answer.operation is not None:
            self.accepted.actions[answer.operation] = action
        else:
            self.accepted.others[answer.code] += 1

    def _cancel(self) -> None:
        identity = self._random.choice(list(self.accepted.actions)[-5:])
        if self._fleet.request("DELETE", f"/1.0/operations/{identity}").code == 200:
            self.accepted.cancels += 1

    def _create(self) -> None:
        start = self._random.random() < 0.5
        body = {"source": EMPTY, "start": start, "node": self._random.choice(self._fleet.nodes)}
        self._ask("create and start" if start else "create", "POST", f"/1.0/vz/{_name()}", body)

    def _change(self, view: dict[str, Any]) -> None:
        path = f"/1.0/vz/{view['id']}"
        other = self._random.choice([node for node in self._fleet.nodes if node != view["node"]] or self._fleet.nodes)
        running = view["status"]["status"] == "Running"
        if view["status"]["status"] == "Error":
            self._ask("delete what failed", "DELETE", f"{path}?force=1")
            return
        state = "stop" if running else "start"
        copied = {"source": {"type": "copy", "source": view["id"]}, "node": other}
        choices: list[tuple[int, str, str, str, Any]] = [
            (5, state, "PUT", f"{path}/state", {"action": state}),
            (2, "move", "POST", path, {"migration": True, "node": other}),
            (2, "snapshot", "POST", f"{path}/snapshots", {"name": _name()}),
            (2, "update", "PUT", path, {"config": {"user.change": _name()}}),
            (1, "delete", "DELETE", f"{path}?force=1", None),
        ]
        if len(self._shown) < self._population:
            choices.append((1, "copy", "POST", f"/1.0/vz/{_name()}", copied))
        if not running:
            choices.append((1, "rename", "POST", path, {"name": _name(), "hostname": _name()}))
        _, action, method, where, body = self._random.choices(choices, [choice[0] for choice in choices])[0]
        self._ask(action, method, where, body)


def _name() -> str:
    return f"c-{secrets.token_hex(4)}"
