"""cleaner.py on a clock that jumps to the next timer, over an engine that says what the test wants."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable

from jobworker.cleaner import AGAIN_CEILING_SECONDS, END_AGAIN_SECONDS, END_TRIES, Cleaner, Ender
from jobworker.container import Answer, Engine


class JumpingLoop(asyncio.SelectorEventLoop):
    """Where nothing is to be done now, it is at once the time of the next timer."""

    now = 0.0

    def __init__(self) -> None:
        loop = self

        class Selector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                loop.now += timeout or 0
                return list(super().select(0))

        super().__init__(Selector())

    def time(self) -> float:
        return self.now


def test_what_can_not_be_removed_is_tried_less_and_less_often() -> None:
    tries: list[float] = []

    async def refuse(
        words: list[str],
        stdin: str = "",  # noqa: ARG001
        environment: dict[str, str] | None = None,  # noqa: ARG001
        output: Callable[[bytes], None] | None = None,  # noqa: ARG001
        deadline: float | None = None,  # noqa: ARG001
    ) -> Answer:
        assert words[-1] == "container"
        tries.append(asyncio.get_running_loop().time())
        return Answer(1, err="device or resource busy")

    async def play() -> None:
        cleaner = Cleaner(Engine(refuse))
        cleaner.add("container")
        while len(tries) < 10:
            cleaner.start(idle=False)
            await asyncio.sleep(0.25)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(play())
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses == [1, 2, 4, 8, 16, 32, *[AGAIN_CEILING_SECONDS] * 3]


def test_all_that_is_to_be_ended_is_looked_for_at_once() -> None:
    """A look goes through all processes of the machine."""
    looks: list[set[str]] = []
    done: list[float] = []
    going_on = {"a", "b", "hangs"}

    async def end_commands(commands: list[set[str]]) -> None:
        looks.append({word.removeprefix("--name=") for words in commands for word in words if "--name=" in word})

    async def play() -> None:
        clock = asyncio.get_running_loop().time
        ender = Ender(end_commands, lambda: done.append(clock()))
        for container in ("a", "b", "hangs"):
            ender.keep_ending(container, lambda container=container: container in going_on)  # type: ignore[misc]
        await asyncio.sleep(0.75 * END_AGAIN_SECONDS)
        going_on.remove("b")
        ender.keep_ending("late", lambda: False)
        assert ender.busy
        await asyncio.sleep(END_TRIES * END_AGAIN_SECONDS)
        assert not ender.busy

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(play())
    assert looks == [{"a", "b", "hangs"}, {"a", "hangs", "late"}, *[{"a", "hangs"}] * (END_TRIES - 2)]
    assert done == [END_TRIES * END_AGAIN_SECONDS]
