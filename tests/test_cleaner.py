"""cleaner.py on a clock that jumps to the next timer, over an engine that says what the test wants."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable

from jobworker.cleaner import AGAIN_CEILING_SECONDS, Cleaner
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
