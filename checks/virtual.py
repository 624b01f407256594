"""Virtual time: an event loop whose clock jumps to the next timer, and processes that `kill -9` ends between two steps.

What goes wrong is not lost here: an exception that a callback raises ends the history.
"""

import asyncio
import contextvars
import itertools
from collections.abc import Coroutine, Iterable, Iterator
from heapq import heappop, heappush
from typing import Any

LIFE: contextvars.ContextVar["Life | None"] = contextvars.ContextVar("life", default=None)


class Broken(Exception):
    """A promise was broken."""


raised: list[BaseException] = []  # in this history, and nobody took note of it


def unseen(tasks: Iterable[asyncio.Task[Any]]) -> Iterator[BaseException]:
    """Give what the tasks that are done have raised, where nobody has asked for it."""
    for task in tasks:
        if task.done() and task._log_traceback and (error := task.exception()):
            yield error


class Life:
    """A process: the tasks that it has started, which `kill -9` ends. What a dead one still does reaches nothing."""

    def __init__(self) -> None:
        self.dead = False
        self.tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        context = contextvars.Context()
        context.run(LIFE.set, self)
        asyncio.get_running_loop().create_task(work, context=context)

    def kill(self) -> None:
        self.dead = True
        raised.extend(unseen(self.tasks))
        for task in self.tasks:
            task.cancel()


class _Call(list[Any]):
    """What the loop is to call: the callback, its arguments and its context. A list is made fastest."""

    def cancel(self) -> None:
        self.clear()

    def cancelled(self) -> bool:
        return not self


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose clock jumps to the next timer, and which knows whose each task is."""

    _ready: Any
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._timers: list[tuple[float, int, _Call]] = []
        self._order = itertools.count()  # of timers that are due at the same time
        self.tasks: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._make_task)

    def _make_task(self, _loop: object, work: Any, context: contextvars.Context | None = None) -> Any:
        task = asyncio.Task(work, loop=self, context=context)
        self.tasks.append(task)
        life = LIFE.get() if context is None else context.get(LIFE)
        if life:
            life.tasks.append(task)
        return task

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        call = _Call((callback, args, context or contextvars.copy_context()))
        self._ready.append(call)
        return call

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        call = _Call((callback, args, context or contextvars.copy_context()))
        heappush(self._timers, (when, next(self._order), call))
        return call

    def _run_once(self) -> None:
        """Run what is due, and go on to the next timer: called by `run_forever` until the loop is stopped."""
        ready = self._ready
        while ready:
            call = ready.popleft()
            if call:
                callback, args, context = call
                context.run(callback, *args)
            if self._stopping:
                return
        while self._timers:
            when, _, call = heappop(self._timers)
            if call:
                self.now = max(self.now, when)
                ready.append(call)
                return
        raise Broken("nothing is left to happen, and not all is done")
