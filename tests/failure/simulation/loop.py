"""Virtual time: an event loop whose clock jumps to the next timer, and processes that can be killed inside it."""

from __future__ import annotations

import asyncio
import contextvars
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

START = datetime(2026, 1, 1, 0, 0, 53, tzinfo=UTC)
"""Wall time at the beginning of every simulation. A full minute comes soon: then snapshots fall due."""


class Crash(BaseException):
    """The process ends here, at once; nothing may catch it."""


class Stuck(Exception):
    """Nothing will ever happen again: every task waits for another."""


class Process:
    """One run of a program: its tasks end together, and from then on nothing that it does reaches the world."""

    def __init__(self, name: str, owner: Any = None) -> None:
        """`owner` is whatever its parts must find: the host or the controller of which this is one life."""
        self.name = name
        self.owner = owner
        self.dead = False
        self.on_death: list[Callable[[], None]] = []
        self.fault: BaseException | None = None
        """What its program raised."""
        self._tasks: dict[Task, None] = {}

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something as a part of this process, and all that it starts."""
        context = contextvars.copy_context()
        context.run(_current.set, self)
        return asyncio.get_running_loop().create_task(work, context=context)

    def run(self, program: Coroutine[Any, Any, Any]) -> None:
        """Start its program; one that fails is the end of the process, and `fault` tells why."""
        self.start(program).add_done_callback(self._program_ended)

    def _program_ended(self, program: asyncio.Task[Any]) -> None:
        if not program.cancelled() and program.exception() is not None and not self.dead:
            self.fault = program.exception()
            self.kill()

    def kill(self) -> None:
        """End it like SIGKILL: its tasks stop where they wait, and find the world closed."""
        if self.dead:
            return
        self.dead = True
        for task in list(self._tasks):
            task.cancel()
        for react in self.on_death:
            react()

    def check(self) -> None:
        """Raise Crash in what is still running of a dead process."""
        if self.dead:
            raise Crash(self.name)

    def add(self, task: Task) -> None:
        """A task of this process begins."""
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: Any) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled():
            failure = task.exception()
            if failure is not None and isinstance(failure, Crash):
                self.kill()


def this_process() -> Process:
    """The process that runs now."""
    process = _current.get()
    if process is None:
        raise RuntimeError("this runs in no simulated process")
    return process


_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Task(asyncio.Task[Any]):
    """A task whose hash is its number: sets of tasks, which asyncio uses, are walked in the same order in every run."""

    number = 0

    def __init__(self, work: Any, *, loop: Any, **options: Any) -> None:
        Task.number += 1
        self._hash = Task.number
        super().__init__(work, loop=loop, **options)

    def __hash__(self) -> int:
        return self._hash


class _Jump:
    """The loop's selector: there is nothing to wait for but time, and time jumps."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("no timer is left and no task can go on")
        self._loop.jump(timeout)
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs in no time: `time` is virtual and jumps to the next timer when nothing is ready."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = _Jump(self)
        self.set_task_factory(_make_task)
        self.faults: list[BaseException] = []
        """What callbacks raised."""
        self.set_exception_handler(self._note)

    def _note(self, _loop: object, context: dict[str, Any]) -> None:
        fault = context.get("exception")
        # What a task raises is for who awaits it; a callback has nobody else.
        if "handle" in context and isinstance(fault, BaseException) and not isinstance(fault, Crash):
            self.faults.append(fault)

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        """Move time forward."""
        self._now += max(0.0, seconds)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """What would run in a thread runs here, and is told at the next turn."""
        future = self.create_future()
        try:
            result = func(*args)
        except Exception as error:
            self.call_soon(_fail, future, error)
        else:
            self.call_soon(_succeed, future, result)
        return future

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Task:
    context = options.get("context")
    process = _current.get() if context is None else context.get(_current)
    task = Task(work, loop=loop, **options)
    if process is not None:
        process.add(task)
        if process.dead:
            task.cancel()
    return task


def _succeed(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


class VirtualClock:
    """A machine's clocks: `zero` is what its monotonic clock showed at the beginning, `skew` its wall clock's error."""

    def __init__(self, loop: VirtualLoop, zero: float = 1000.0, rate: float = 1.0) -> None:
        self._loop = loop
        self._zero = zero
        self._rate = rate
        self.skew = 0.0

    def monotonic(self) -> float:
        return self._zero + self._loop.time() * self._rate

    def now(self) -> datetime:
        return START + timedelta(seconds=self._loop.time() + self.skew)


@contextmanager
def virtual_world(seed: int) -> Iterator[VirtualLoop]:
    """A loop in which everything that programs get from chance or from the clock comes from the seed."""
    chance = random.Random(f"{seed}/urandom")
    loop = VirtualLoop()
    before = random.getstate()
    random.seed(seed)
    Task.number = 0
    with (
        mock.patch.object(os, "urandom", chance.randbytes),
        mock.patch.object(random, "_urandom", chance.randbytes),
        mock.patch.object(time, "time_ns", lambda: int((START.timestamp() + loop.time()) * 1e9)),
    ):
        try:
            yield loop
        finally:
            _empty(loop)
            loop.close()
            random.setstate(before)


def _empty(loop: VirtualLoop) -> None:
    """End every task that is left, so that none of them outlives the simulation."""
    for _ in range(100):
        left = sorted(asyncio.all_tasks(loop), key=hash)
        if not left:
            return
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
