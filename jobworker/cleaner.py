"""Ends and removes containers that nobody needs any more. It knows nothing of jobs."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable

from jobworker.container import Engine, NotStarted

REMOVE_AT_ONCE = 100
GATHER_SECONDS = 2  # `docker rm` takes a tenth of the processor time that a short job takes
REMOVALS = 8  # calls at the same time, where some hang
HUNG_SECONDS = 2
AGAIN_SECONDS = 1
AGAIN_CEILING_SECONDS = 60

END_TRIES, END_AGAIN_SECONDS = 10, 0.5

log = logging.getLogger("worker")


class Ender:
    """Ends the engine's commands of containers.

    end_commands: kills those that have all words of one of these. Raises NotStarted. then: called when none is left
    of those that it was to keep ending.
    """

    def __init__(self, end_commands: Callable[[list[set[str]]], Awaitable[None]], then: Callable[[], None]) -> None:
        self._end_commands, self._then = end_commands, then
        self._ending: dict[str, tuple[int, Callable[[], bool]]] = {}  # how often still, and while what is so
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return len(self._ending) > 0

    async def end(self, containers: Iterable[str]) -> None:
        commands = [words for each in containers for words in ({"run", f"--name={each}"}, {"logs", each})]
        with contextlib.suppress(NotStarted):
            await self._end_commands(commands)

    def keep_ending(self, container: str, goes_on: Callable[[], bool]) -> None:
        """End its commands, also one that is only about to start, for some seconds while it `goes_on`."""
        is_first = not self._ending
        self._ending[container] = END_TRIES, goes_on
        if is_first:
            self._task = asyncio.ensure_future(self._keep())

    async def _keep(self) -> None:
        while self._ending:  # all of them by one look at what runs
            ending = list(self._ending)
            await self.end(ending)
            await asyncio.sleep(END_AGAIN_SECONDS)
            for container in ending:
                tries, goes_on = self._ending.pop(container)
                if tries > 1 and goes_on():
                    self._ending[container] = tries - 1, goes_on
        self._then()


class Cleaner:
    """Removes containers, some in one call.

    One that fails waits longer each time, and is tried in smaller and smaller company, so that it holds up no other.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: dict[str, tuple[int, float]] = {}  # how often it has failed, and when it is due
        self._under_way: set[str] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._first_tries_from = 0.0

    def add(self, container: str) -> None:
        if container not in self._under_way:
            self._waiting.setdefault(container, (0, asyncio.get_running_loop().time() + GATHER_SECONDS))

    def start(self, idle: bool) -> None:
        """Begin to remove what is due; where the worker is idle, all that was not tried yet."""
        now = asyncio.get_running_loop().time()
        for failures in sorted({failures for failures, _due in self._waiting.values()}):
            if len(self._calls) >= REMOVALS or (failures == 0 and now < self._first_tries_from):
                continue
            alike = {each: at for each, (count, at) in self._waiting.items() if count == failures}
            due = [each for each, at in alike.items() if at <= now]
            if failures == 0 and (due or idle):
                due = list(alike)  # in one call
                self._first_tries_from = now + HUNG_SECONDS  # no second one beside it, unless it hangs
            if due:
                call = asyncio.ensure_future(self._remove(due[: REMOVE_AT_ONCE // 10**failures or 1]))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    async def remove_all(self) -> None:
        """Try once more to remove all that is left."""
        if self._calls:
            await asyncio.wait(self._calls)
        left = list(self._waiting)
        for start in range(0, len(left), REMOVE_AT_ONCE):
            await self._remove(left[start : start + REMOVE_AT_ONCE])

    async def _remove(self, containers: list[str]) -> None:
        failures = {each: self._waiting.pop(each)[0] for each in containers}
        self._under_way.update(containers)
        failed = await self._engine.remove(containers)
        self._under_way.difference_update(containers)
        now = asyncio.get_running_loop().time()
        if 0 in failures.values():
            self._first_tries_from = 0
        for container in failed:
            delay = min(AGAIN_SECONDS * 2 ** failures[container], AGAIN_CEILING_SECONDS)
            self._waiting[container] = failures[container] + 1, now + delay
        for complaint in sorted({failed[each] for each in failed if failures[each] == 0}):
            names = ", ".join(each for each in failed if failed[each] == complaint)
            log.warning("can't remove %s; trying again: %s", names, complaint)
